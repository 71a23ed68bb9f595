//! Volumes on servers with tools that only write down what they were told, and a mount table that is a file.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Instant;

use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Volume};
use serde_json::{Value, json};

use super::tools::Tools;
use super::*;
use crate::contracts::SourceError;

/// Far more than a test takes.
const LONG: Duration = Duration::from_secs(60);

/// Writes a script. By a child: a file that this process has open for writing while another thread forks cannot be run.
pub(super) fn write_tool(dir: &Path, name: &str, text: &str) {
    let file = dir.join(name);
    let write = "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$2\" && chmod 755 \"$2\"";
    let status = std::process::Command::new("/bin/sh").args(["-c", write, "sh", text]).arg(&file).status();
    assert!(status.unwrap().success());
}

struct Objects;

impl ObjectSource for Objects {
    fn config_map<'a>(
        &'a self,
        _namespace: &'a str,
        _name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<ConfigMap>>, SourceError>> {
        async { Ok(None) }.boxed()
    }

    fn secret<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Option<Arc<Secret>>, SourceError>> {
        let is_it = (namespace, name) == ("ns", "chap");
        let data = [("node.session.auth.password".to_owned(), ByteString(b"hush\n".to_vec()))];
        let secret = Secret { data: Some(data.into()), ..Secret::default() };
        async move { Ok(is_it.then(|| Arc::new(secret))) }.boxed()
    }
}

struct Bench {
    dir: tempfile::TempDir,
    root: PathBuf,
    places: Places,
    remote: Remote,
}

/// What every fake tool begins with; `$D` is the test's directory.
fn head(dir: &Path, name: &str) -> String {
    format!("D={}; echo {name} \"$@\" >> $D/log; for last; do before=$at; at=$last; done\n", dir.display())
}

const MOUNT: &str = r#"
case "$*" in *dead:*) sleep 1000;; *refused:*) echo 'mount.nfs: Connection refused' >&2; exit 32;; esac
device=0:$$
case "$*" in *bind*) device=$(grep " / $before " $D/table | head -n1 | cut -d' ' -f3);; esac
echo "1 1 $device / $last rw - fake $before rw" >> $D/table
"#;

const UMOUNT: &str = r#"
mode=$(cat $D/server 2>/dev/null)
case "$mode $*" in
    *"-f "*) ;;
    "very dead "*|"dead -c"*) sleep 1000;;
    busy*) echo 'target is busy.' >&2; exit 32;;
esac
grep -v " / $last " $D/table > $D/table.new; mv $D/table.new $D/table
"#;

const ISCSIADM: &str = r#"
case "$*" in
    *"iface -I"*show*) echo 'iface.transport_name = tcp';;
    "-m session") cat $D/sessions 2>/dev/null || { echo 'iscsiadm: No active sessions.'; exit 21; };;
    *--login*)
        test -e $D/refuses && { echo 'iscsiadm: Could not login' >&2; exit 24; }
        echo 'tcp: [4] 10.0.0.1:3260,1 iqn.a:disk (non-flash)' > $D/sessions
        ln -sf ../../sdz $D/dev/disk/by-path/ip-10.0.0.1:3260-iscsi-iqn.a:disk-lun-7;;
    *--logout*) rm -f $D/sessions $D/dev/disk/by-path/*;;
esac
"#;

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().canonicalize().unwrap();
        for path in [
            "bin",
            "root/pods",
            "dev/disk/by-path",
            "sys/class/iscsi_session/session4",
            "sys/class/scsi_host/host3",
        ] {
            fs::create_dir_all(at.join(path)).unwrap();
        }
        fs::create_dir_all(at.join("sys/devices/platform/host3/session4")).unwrap();
        symlink(
            at.join("sys/devices/platform/host3/session4"),
            at.join("sys/class/iscsi_session/session4/device"),
        )
        .unwrap();
        fs::create_dir_all(at.join("sys/block/sdz/device")).unwrap();
        fs::write(at.join("dev/sdz"), "a disk").unwrap();
        fs::write(at.join("table"), "").unwrap();
        let blkid = "test -e $D/content || exit 2; cat $D/content";
        for (name, text) in [
            ("mount", MOUNT),
            ("umount", UMOUNT),
            ("iscsiadm", ISCSIADM),
            ("blkid", blkid),
            ("mkfs.ext4", "echo TYPE=ext4 > $D/content"),
            ("fsck", ""),
            ("mount.nfs", ""),
        ] {
            write_tool(&at.join("bin"), name, &format!("{}{text}", head(&at, name)));
        }
        let places = Places {
            tools: Tools::at(vec![at.join("bin"), PathBuf::from("/bin"), PathBuf::from("/usr/bin")]),
            table: at.join("table"),
            dev: at.join("dev"),
            sys: at.join("sys"),
            mount: LONG,
            unmount: LONG,
            login: LONG,
            format: LONG,
            device: LONG,
            multipath: LONG,
            waiting: Arc::default(),
        };
        let root = at.join("root");
        let remote = Remote::at(&root, Arc::new(Objects), places.clone());
        Self { dir, root, places, remote }
    }

    /// As a new agent sees it.
    fn restart(&mut self) {
        self.remote = Remote::at(&self.root, Arc::new(Objects), self.places.clone());
    }

    /// With a deadline that is waited for.
    fn impatient(mut self) -> Self {
        self.places =
            Places { mount: Duration::from_secs(1), unmount: Duration::from_secs(1), ..self.places };
        self.restart();
        self
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What tools were told since the last question.
    fn log(&self) -> Vec<String> {
        let at = format!("{}/", self.dir.path().canonicalize().unwrap().display());
        let text = fs::read_to_string(self.file("log")).unwrap_or_default().replace(&at, "");
        fs::remove_file(self.file("log")).ok();
        text.lines().map(str::to_owned).collect()
    }

    fn volume(source: &Value) -> NetworkVolume {
        let mut volume = json!({"name": "v"});
        for (key, value) in source.as_object().unwrap() {
            volume[key] = value.clone();
        }
        let volume: Volume = serde_json::from_value(volume).unwrap();
        NetworkVolume::inline(&volume, "ns").unwrap()
    }

    fn nfs(server: &str) -> NetworkVolume {
        Self::volume(&json!({"nfs": {"server": server, "path": "/d"}}))
    }

    fn disk(more: &Value) -> NetworkVolume {
        let mut source = json!({"targetPortal": "10.0.0.1", "iqn": "iqn.a:disk", "lun": 7});
        for (key, value) in more.as_object().unwrap() {
            source[key] = value.clone();
        }
        Self::volume(&json!({"iscsi": source}))
    }

    async fn set_up(&self, uid: &str, volume: &NetworkVolume) -> Result<PathBuf, String> {
        let done = self.remote.set_up(uid, volume, Group::default()).await;
        done.map_err(|error| error.to_string())
    }

    /// Waits until the disks that nobody has were taken away.
    async fn swept(&self) {
        let began = Instant::now();
        while self.remote.state().sweeping.is_some() {
            assert!(began.elapsed() < LONG, "{:?}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test]
async fn a_servers_directory_is_mounted_once_found_again_and_unmounted() {
    let mut bench = Bench::new();
    let mut volume = Bench::nfs("s");
    volume.mount_options = vec!["vers=4.1".to_owned()];
    volume.read_only = true;
    let path = bench.set_up("u", &volume).await.unwrap();
    assert_eq!(path, bench.root.join("pods/u/volumes/kubernetes.io~nfs/v"));
    let told = "mount -t nfs -o ro,vers=4.1 -- s:/d root/pods/u/volumes/kubernetes.io~nfs/v";
    assert_eq!(bench.log(), [told]);
    bench.restart();
    assert_eq!(bench.set_up("u", &volume).await.unwrap(), path);
    assert!(bench.log().is_empty(), "it is mounted");
    bench.remote.tear_down("u").await.unwrap();
    assert_eq!(bench.log(), ["umount -c root/pods/u/volumes/kubernetes.io~nfs/v"]);
    assert!(!path.exists());
    bench.remote.tear_down("u").await.unwrap();
    assert!(bench.log().is_empty());
}

#[tokio::test]
async fn who_cannot_mount_says_what_is_missing_or_wrong() {
    let bench = Bench::new();
    let error = bench.set_up("u", &Bench::nfs("refused")).await.unwrap_err();
    assert!(error.starts_with("MountVolume.SetUp failed for volume \"v\" : mount failed: exit status: 32\n"));
    assert!(error.contains("Mounting arguments: -t nfs -- refused:/d"), "{error}");
    assert!(error.contains("Output: mount.nfs: Connection refused"), "{error}");
    assert!(!bench.root.join("pods/u/volumes/kubernetes.io~nfs/v").exists());
    fs::remove_file(bench.file("bin/mount.nfs")).unwrap();
    let nowhere = Tools::at(vec![bench.file("bin")]);
    let remote = Remote::at(&bench.root, Arc::new(Objects), Places { tools: nowhere, ..bench.places });
    let error = remote.set_up("u", &Bench::nfs("s"), Group::default()).await.unwrap_err().to_string();
    assert!(error.contains("Debian: nfs-common"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_gone_keeps_neither_other_pods_nor_the_end_of_its_own() {
    let bench = Bench::new().impatient();
    let (dead, alive) = (Bench::nfs("dead"), Bench::nfs("s"));
    let (stuck, other) = tokio::join!(bench.set_up("stuck", &dead), bench.set_up("other", &alive));
    let error = stuck.unwrap_err();
    assert!(
        error.contains("mount did not end within 1 s and was killed: the server does not answer"),
        "{error}"
    );
    other.unwrap();
    bench.log();
    // Now the other one's server goes, too: first it does not answer, then not even to what asks nobody.
    for (server, last) in [("dead", "umount -i -l -c"), ("very dead", "umount -i -f -l -c")] {
        fs::write(bench.file("server"), server).unwrap();
        bench.set_up("other", &alive).await.unwrap();
        bench.remote.tear_down("other").await.unwrap();
        let log = bench.log();
        assert!(log.last().unwrap().starts_with(last), "{log:?}");
        assert_eq!(fs::read_to_string(bench.file("table")).unwrap(), "");
    }
}

#[tokio::test]
async fn a_disk_is_shared_by_pods_and_logged_out_with_the_last() {
    let mut bench = Bench::new();
    let disk = Bench::disk(&json!({"chapAuthSession": true, "secretRef": {"name": "chap"}}));
    bench.set_up("a", &disk).await.unwrap();
    let log = bench.log().join("\n");
    for told in [
        "-n node.session.auth.password -v hush\n",
        "iscsiadm -m node -p 10.0.0.1:3260 -T iqn.a:disk -I default --login\n",
        "mkfs.ext4 -F -m0 dev/sdz\n",
        "mount -t ext4 -o defaults -- dev/sdz root/plugins/kubernetes.io/iscsi/iface-default/10.0.0.1:3260-iqn.a:disk-lun-7\n",
        "mount -o bind -- root/plugins/kubernetes.io/iscsi/iface-default/10.0.0.1:3260-iqn.a:disk-lun-7 root/pods/a/volumes/kubernetes.io~iscsi/v",
    ] {
        assert!(log.contains(told), "{told} is not in\n{log}");
    }
    assert_eq!(fs::read_to_string(bench.file("sys/class/scsi_host/host3/scan")).unwrap(), "0 0 7");
    bench.set_up("b", &disk).await.unwrap();
    assert_eq!(bench.log().len(), 1, "one more bind mount");
    bench.restart();
    bench.remote.tear_down("a").await.unwrap();
    bench.swept().await;
    assert!(bench.log().iter().all(|line| line.starts_with("umount -c root/pods/a/")), "the other has it");
    bench.remote.tear_down("b").await.unwrap();
    bench.swept().await;
    let log = bench.log().join("\n");
    assert!(log.contains("umount -c root/plugins/") && log.contains("--logout"), "{log}");
    assert_eq!(fs::read_to_string(bench.file("sys/block/sdz/device/delete")).unwrap(), "1");
    assert!(!bench.root.join("plugins/kubernetes.io/iscsi/iface-default").exists());
    // Once more: the disk is not empty now.
    bench.set_up("c", &disk).await.unwrap();
    let log = bench.log().join("\n");
    assert!(!log.contains("mkfs") && log.contains("fsck -a dev/sdz"), "{log}");
}

#[tokio::test]
async fn several_ways_to_a_disk_are_waited_for_until_they_are_one() {
    let bench = Bench::new();
    // The second portal gives nothing at first.
    let second = fs::read_to_string(bench.file("bin/iscsiadm")).unwrap();
    let says = "*--login*10.0.0.2*|*10.0.0.2*--login*) n=$(cat $D/tries 2>/dev/null); echo x$n > $D/tries; test \"$n\" = x || exit 24
        echo 'tcp: [4] 10.0.0.2:3260,1 iqn.a:disk (non-flash)' >> $D/sessions
        ln -sf ../../sdy $D/dev/disk/by-path/ip-10.0.0.2:3260-iscsi-iqn.a:disk-lun-7;;\n    *--login*)";
    write_tool(
        &bench.file("bin"),
        "iscsiadm",
        &second.replace("#!/bin/sh\n", "").replacen("*--login*)", says, 1),
    );
    fs::write(bench.file("dev/sdy"), "a disk").unwrap();
    fs::write(bench.file("dev/dm-0"), "a disk").unwrap();
    let disk = Bench::disk(&json!({"portals": ["10.0.0.2"]}));
    let whole = async {
        // The daemon needs a moment.
        while fs::read_to_string(bench.file("tries")).unwrap_or_default() != "xx\n" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        fs::create_dir_all(bench.file("sys/block/dm-0/slaves/sdy")).unwrap();
        fs::create_dir_all(bench.file("sys/block/dm-0/dm")).unwrap();
        fs::write(bench.file("sys/block/dm-0/dm/uuid"), "mpath-1\n").unwrap();
    };
    let (done, ()) = tokio::join!(bench.set_up("a", &disk), whole);
    done.unwrap();
    let log = bench.log().join("\n");
    assert!(log.contains("mount -t ext4 -o defaults -- dev/dm-0 "), "{log}");
    assert_eq!(log.matches("-p 10.0.0.2:3260 -T iqn.a:disk -I default --login").count(), 2, "{log}");
}

#[tokio::test]
async fn a_disk_that_does_not_answer_keeps_one_thread_however_often_it_is_asked() {
    let bench = Bench::new();
    // Nobody reads what is written: the writer waits.
    let delete = bench.file("sys/block/sdz/device/delete");
    bench.set_up("a", &Bench::disk(&json!({}))).await.unwrap();
    nix::unistd::mkfifo(&delete, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let places = Places { login: Duration::from_millis(500), ..bench.places.clone() };
    let remote = Remote::at(&bench.root, Arc::new(Objects), places);
    let waiting = || remote.0.places.waiting.lock().unwrap().len();
    let disk = remote.disks().remove(0);
    for _ in 0..3 {
        remote.0.places.detach(&disk, false).await.ok();
        assert_eq!(waiting(), 1);
    }
    let told = tokio::task::spawn_blocking(move || fs::read_to_string(delete).unwrap());
    assert_eq!(told.await.unwrap(), "1", "it was told once");
}

#[tokio::test]
async fn a_disk_with_anything_on_it_is_not_formatted() {
    let bench = Bench::new();
    fs::write(bench.file("content"), "TYPE=LVM2_member\n").unwrap();
    // mount(8) would refuse it; this one mounts everything.
    bench.set_up("a", &Bench::disk(&json!({}))).await.unwrap();
    assert!(!bench.log().iter().any(|line| line.starts_with("mkfs")));
    let bench = Bench::new();
    let error = bench.set_up("a", &Bench::disk(&json!({"readOnly": true}))).await.unwrap_err();
    assert!(error.starts_with("MountVolume.MountDevice failed"), "{error}");
    assert!(error.contains("cannot mount unformatted disk"), "{error}");
    assert!(!bench.log().iter().any(|line| line.starts_with("mkfs")));
}

#[tokio::test]
async fn what_a_failed_login_leaves_goes_with_its_pod() {
    let bench = Bench::new();
    fs::write(bench.file("refuses"), "").unwrap();
    let error = bench.set_up("a", &Bench::disk(&json!({}))).await.unwrap_err();
    assert!(error.starts_with("MountVolume.WaitForAttach failed for volume \"v\""), "{error}");
    assert!(
        error.contains("iscsi: failed to attach disk: exit status: 24: iscsiadm: Could not login"),
        "{error}"
    );
    assert!(bench.log().iter().any(|line| line.contains("-m node") && line.ends_with("-o delete")));
    fs::remove_file(bench.file("refuses")).unwrap();
    write_tool(&bench.file("bin"), "blkid", "echo broken; exit 4");
    let error = bench.set_up("a", &Bench::disk(&json!({}))).await.unwrap_err();
    assert!(error.contains("could not determine if disk"), "{error}");
    bench.remote.tear_down("a").await.unwrap();
    bench.swept().await;
    assert!(bench.log().iter().any(|line| line.contains("--logout")));
}

#[tokio::test]
async fn a_disk_in_use_is_not_taken_out_of_sight() {
    let bench = Bench::new();
    bench.set_up("a", &Bench::disk(&json!({}))).await.unwrap();
    fs::write(bench.file("server"), "busy").unwrap();
    let error = bench.remote.tear_down("a").await.unwrap_err().to_string();
    assert!(error.contains("target is busy"), "{error}");
    assert!(!bench.log().iter().any(|line| line.contains("-l") && line.starts_with("umount")));
    fs::remove_file(bench.file("server")).unwrap();
    bench.remote.tear_down("a").await.unwrap();
    bench.swept().await;
    assert_eq!(fs::read_to_string(bench.file("table")).unwrap(), "");
}
