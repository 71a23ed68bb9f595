//! What is in the demo images: busybox with its applets, and Debian's nginx with the libraries it links.

use anyhow::{Context, Result};

use super::deb::Packages;
use super::layer::{Entry, Tree};
use crate::cmd::Cmd;

/// The Debian packages whose files go into the images.
pub(crate) const PACKAGES: &[&str] =
    &["busybox-static", "nginx", "nginx-common", "libc6", "libcrypt1", "libpcre2-8-0", "libssl3", "zlib1g"];

/// The usual PATH variable of images.
pub(crate) const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Files of packages that a container never reads.
const LEFT_OUT: &[&str] =
    &["share/doc", "share/man", "share/locale", "share/lintian", "/gconv", "/perl", "etc/", "DEBIAN"];

/// busybox, its applets as links, and the files that every image has.
pub(crate) fn busybox(packages: &Packages) -> Result<Tree> {
    let mut tree = Tree::default();
    let tool = packages.tree("busybox-static").join("bin/busybox");
    let content = std::fs::read(&tool).with_context(|| format!("reading {}", tool.display()))?;
    tree.add("bin/busybox", Entry::File(0o755, content));
    for applet in Cmd::new(&tool).args(["--list"]).output()?.lines() {
        tree.add(&format!("bin/{applet}"), Entry::Link("busybox".to_owned()));
    }
    tree.add("bin/busybox", Entry::File(0o755, std::fs::read(&tool)?));
    for dir in ["dev", "proc", "sys", "etc", "home", "usr/bin", "usr/sbin", "var/log", "run"] {
        tree.add(dir, Entry::Dir(0o755));
    }
    tree.add("tmp", Entry::Dir(0o1777));
    tree.add("root", Entry::Dir(0o700));
    tree.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n");
    tree.text("etc/group", "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n");
    tree.text("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n");
    Ok(tree)
}

/// Debian's nginx, its libraries, and a configuration as the usual nginx image has it.
pub(crate) fn nginx(packages: &Packages) -> Result<Tree> {
    let mut tree = Tree::default();
    for name in PACKAGES.iter().filter(|name| **name != "busybox-static") {
        let keep = |path: &str| {
            path != ".complete" && !LEFT_OUT.iter().any(|part| format!("/{path}/").contains(part))
        };
        tree.add_dir(&packages.tree(name), &keep)?;
    }
    let mime = packages.tree("nginx-common").join("etc/nginx/mime.types");
    let types = std::fs::read(&mime).with_context(|| format!("reading {}", mime.display()))?;
    tree.add("etc/nginx/mime.types", Entry::File(0o644, types));
    tree.text("etc/nginx/nginx.conf", NGINX_CONF);
    tree.add("etc/nginx/conf.d", Entry::Dir(0o755));
    tree.text("etc/nginx/conf.d/default.conf", DEFAULT_SITE);
    tree.add("var/log/nginx/access.log", Entry::Link("/dev/stdout".to_owned()));
    tree.add("var/log/nginx/error.log", Entry::Link("/dev/stderr".to_owned()));
    for dir in ["var/cache/nginx", "var/lib/nginx"] {
        tree.add(dir, Entry::Dir(0o755));
    }
    Ok(tree)
}

/// The layer in which two versions differ.
pub(crate) fn start_page(version: &str) -> Tree {
    let mut tree = Tree::default();
    tree.text(
        "usr/share/nginx/html/index.html",
        &format!(
            "<!DOCTYPE html>\n<html>\n<head><title>Welcome to nginx!</title></head>\n<body>\n\
             <h1>Welcome to nginx!</h1>\n<p>nginx:{version}, made from Debian's package for Keelson.</p>\n\
             </body>\n</html>\n"
        ),
    );
    tree
}

const NGINX_CONF: &str = "\
user www-data;
worker_processes auto;
error_log /var/log/nginx/error.log notice;
pid /run/nginx.pid;
events {
    worker_connections 1024;
}
http {
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    access_log /var/log/nginx/access.log;
    sendfile on;
    keepalive_timeout 65;
    include /etc/nginx/conf.d/*.conf;
}
";

/// The header tells which pod answered.
const DEFAULT_SITE: &str = "\
server {
    listen 80;
    server_name localhost;
    add_header X-Served-By $hostname always;
    location / {
        root /usr/share/nginx/html;
        index index.html;
    }
}
";
