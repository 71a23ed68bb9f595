//! Image manager, consistency and identifiers; pulls with credentials; bad and hostile images.

use std::time::Duration;

use anyhow::{Context, Result};
use cri_shim_api::v1;

use super::super::case::{Case, case, holds, refused, refused_with, same, skip};
use super::super::context::{T, image_spec};
use super::super::registry::{PASSWORD, USER};

pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let group = "image manager";
    all.extend([
        case(group, "pull by tag: status and list have it, with tag, digest and size", by_tag).serial(),
        case(group, "pull without a tag means latest", without_tag).serial(),
        case(group, "pull by digest", by_digest).serial(),
        case(group, "pull by tag and digest", by_tag_and_digest).serial(),
        case(group, "an image is found by tag, digest and id", reference_kinds).serial(),
        case(group, "the id is the digest of the image's configuration", id_is_config).serial(),
        case(group, "ImageStatus of an unknown image is empty and no error", unknown),
        case(group, "the image's user: a number is uid, a name is username", users).serial(),
        case(group, "three tags of one image are one image", three_tags).serial(),
        case(group, "Remove by one tag removes the image with all its tags", remove_all_tags).serial(),
        case(group, "Remove by id removes it", remove_by_id).serial(),
        case(group, "the same image from two hosts is one image with both names", two_hosts).serial(),
        case(group, "an index: the part for this machine is taken", index).serial(),
        case(group, "Docker's manifest and layer types", docker_types).serial(),
        case(group, "verbose status gives the image's configuration", verbose).serial(),
        case(group, "ListImages with a filter", filtered).serial(),
        case(group, "a second pull fetches no layer again", second_pull).serial(),
        case(group, "ImageFsInfo tells a mount point, bytes and inodes", fs_info),
        case(group, "StreamImages gives what ListImages gives", stream).serial(),
        case(
            group,
            "a pull beyond its caller's deadline is DeadlineExceeded, and a later one succeeds",
            pull_deadline,
        )
        .serial(),
        case(group, "a pull that makes no progress is given up with DeadlineExceeded", no_progress).serial(),
    ]);
    let group = "image consistency";
    all.extend([
        case(group, "five removals at once all succeed", five_removals).serial(),
        case(group, "five pulls at once give one id", five_pulls).serial(),
        case(group, "list right after pull and remove is up to date", list_after).serial(),
        case(group, "an image can be removed while a container runs on it", remove_in_use).serial(),
        case(group, "Image.id, PullImageResponse.image_ref and Container.image_id are one", identifiers)
            .serial(),
    ]);
    let group = "image credentials";
    all.extend([
        case(group, "a private image without credentials is refused", no_credentials),
        case(group, "with user and password it is pulled", credentials).serial(),
        case(group, "with the pair in base64 it is pulled", base64_auth).serial(),
        case(group, "with a wrong password it is refused", wrong_password),
        case(group, "credentials for another server are not sent", other_server),
        case(group, "credentials for this very server are sent", this_server).serial(),
    ]);
    let group = "bad images";
    all.extend([
        case(group, "malformed references are refused", malformed_references),
        case(group, "a tag that does not exist is refused, and named", unknown_tag),
        case(group, "a registry that is not there is refused", no_registry),
        case(group, "a manifest that is no JSON", |t| broken(t, "broken/manifest")),
        case(group, "a layer that is missing", |t| broken(t, "broken/missing-blob")),
        case(group, "a layer of other bytes than its digest says", |t| broken(t, "broken/digest")),
        case(group, "a layer shorter than its size says", |t| broken(t, "broken/size")),
        case(group, "an index without this platform", |t| broken(t, "broken/platform")),
        case(group, "a layer cannot write through a symbolic link to outside", |t| {
            hostile(t, "hostile/link")
        }),
        case(group, "a layer cannot write outside with ..", |t| hostile(t, "hostile/dotdot")),
        case(group, "a layer cannot link to a file outside", hard_link),
    ]);
    all
}

fn own(t: &T, name: &str) -> Result<String> {
    t.suite.catalog.reference(&format!("conformance/image-{name}"))
}

async fn pulled(t: &T, reference: &str) -> Result<(String, v1::Image)> {
    let id = t.try_pull(reference, None).await.with_context(|| format!("PullImage {reference}"))?;
    let image =
        t.image(reference).await?.with_context(|| format!("{reference} has no status after its pull"))?;
    Ok((id, image))
}

async fn list(t: &T) -> Result<Vec<v1::Image>> {
    let answer = t.im().list_images(v1::ListImagesRequest::default()).await.context("ListImages")?;
    Ok(answer.into_inner().images)
}

async fn by_tag(t: T) -> Result<()> {
    let reference = format!("{}:1", own(&t, "list")?);
    let (id, image) = pulled(&t, &reference).await?;
    same("repo_tags", image.repo_tags.clone(), vec![reference.clone()])?;
    anyhow::ensure!(image.size > 0, "the size is 0");
    let digest = image.repo_digests.first().context("no digest")?;
    holds("repo_digests", digest, &format!("{}@sha256:", own(&t, "list")?))?;
    let listed = list(&t).await?;
    let found = listed.into_iter().find(|known| known.id == id).context("it is not listed")?;
    same("the listed one", found, image)
}

async fn without_tag(t: T) -> Result<()> {
    let (_, image) = pulled(&t, &own(&t, "list")?).await?;
    same("repo_tags", image.repo_tags, vec![format!("{}:latest", own(&t, "list")?)])
}

async fn by_digest(t: T) -> Result<()> {
    let reference = format!("{}@{}", own(&t, "tags")?, t.suite.catalog.tags_digest);
    let (_, image) = pulled(&t, &reference).await?;
    same("repo_digests", image.repo_digests, vec![reference])?;
    same("repo_tags", image.repo_tags.len(), 0)
}

async fn by_tag_and_digest(t: T) -> Result<()> {
    let reference = format!("{}:1@{}", own(&t, "tags")?, t.suite.catalog.tags_digest);
    let (_, image) = pulled(&t, &reference).await?;
    holds("repo_digests", &image.repo_digests.join(" "), &t.suite.catalog.tags_digest)
}

async fn reference_kinds(t: T) -> Result<()> {
    let reference = format!("{}:2", own(&t, "tags")?);
    let (id, image) = pulled(&t, &reference).await?;
    let digest = format!("{}@{}", own(&t, "tags")?, t.suite.catalog.tags_digest);
    let short = id.strip_prefix("sha256:").context("the id begins with sha256:")?[..12].to_owned();
    for other in [digest, id.clone(), short] {
        let found = t.image(&other).await?.with_context(|| format!("not found by {other}"))?;
        same("the image", found.id, image.id.clone())?;
    }
    Ok(())
}

async fn id_is_config(t: T) -> Result<()> {
    let (id, _) = pulled(&t, &format!("{}:1", own(&t, "tags")?)).await?;
    same("the id", id.as_str(), t.suite.catalog.tags_config.as_str())
}

async fn unknown(t: T) -> Result<()> {
    for name in ["127.0.0.1:1/nobody/has-this:latest", &format!("sha256:{}", "e".repeat(64))] {
        same(name, t.image(name).await?, None)?;
    }
    Ok(())
}

async fn users(t: T) -> Result<()> {
    for (name, uid, username) in [("user-uid", Some(1002), ""), ("user-name", None, "conf")] {
        let reference = t.suite.catalog.reference(&format!("conformance/{name}:latest"))?;
        t.pull(&reference).await?;
        let image = t.image(&reference).await?.context("no status")?;
        same("uid", image.uid.map(|uid| uid.value), uid)?;
        same("username", image.username.as_str(), username)?;
    }
    Ok(())
}

async fn three_tags(t: T) -> Result<()> {
    for tag in ["1", "2", "3"] {
        pulled(&t, &format!("{}:{tag}", own(&t, "tags")?)).await?;
    }
    let name = own(&t, "tags")?;
    let images = list(&t).await?;
    let ours: Vec<_> =
        images.into_iter().filter(|image| image.repo_tags.iter().any(|tag| tag.starts_with(&name))).collect();
    same("images", ours.len(), 1)?;
    let mut tags = ours[0].repo_tags.clone();
    tags.sort();
    same("tags", tags, ["1", "2", "3"].map(|tag| format!("{name}:{tag}")).to_vec())
}

async fn remove_all_tags(t: T) -> Result<()> {
    let name = own(&t, "remove")?;
    for tag in ["1", "2", "3"] {
        pulled(&t, &format!("{name}:{tag}")).await?;
    }
    t.remove_image(&format!("{name}:2")).await?;
    for tag in ["1", "2", "3"] {
        same(tag, t.image(&format!("{name}:{tag}")).await?, None)?;
    }
    Ok(())
}

async fn remove_by_id(t: T) -> Result<()> {
    let reference = format!("{}:1", own(&t, "remove")?);
    let (id, _) = pulled(&t, &reference).await?;
    t.remove_image(&id).await?;
    same("the image", t.image(&reference).await?, None)
}

async fn two_hosts(t: T) -> Result<()> {
    let first = format!("{}:1", own(&t, "two-hosts")?);
    let second = format!("{}/conformance/image-two-hosts:1", t.suite.catalog.other_host);
    let ((one, _), (two, image)) = (pulled(&t, &first).await?, pulled(&t, &second).await?);
    same("the ids", one, two.clone())?;
    let mut tags = image.repo_tags;
    tags.sort();
    same("tags", tags, vec![first, second])
}

async fn index(t: T) -> Result<()> {
    let (_, image) = pulled(&t, &format!("{}:latest", own(&t, "index")?)).await?;
    let request = v1::ImageStatusRequest { image: Some(image_spec(&image.id)), verbose: true };
    let info = t.im().image_status(request).await.context("ImageStatus")?.into_inner().info;
    let text = info.values().cloned().collect::<String>();
    anyhow::ensure!(!text.contains("s390x"), "the wrong platform: {text}");
    Ok(())
}

async fn docker_types(t: T) -> Result<()> {
    let (id, _) = pulled(&t, &format!("{}:latest", own(&t, "docker")?)).await?;
    holds("the id", &id, "sha256:")
}

async fn verbose(t: T) -> Result<()> {
    let reference = t.suite.catalog.reference("conformance/settings:latest")?;
    t.pull(&reference).await?;
    let request = v1::ImageStatusRequest { image: Some(image_spec(&reference)), verbose: true };
    let info = t.im().image_status(request).await.context("ImageStatus")?.into_inner().info;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("no `info`")?)?;
    same("the label", info["imageSpec"]["config"]["Labels"]["made-by"].as_str(), Some("keelson"))
}

async fn filtered(t: T) -> Result<()> {
    let reference = format!("{}:1", own(&t, "list")?);
    let (id, _) = pulled(&t, &reference).await?;
    let filter = v1::ImageFilter { image: Some(image_spec(&reference)) };
    let request = v1::ListImagesRequest { filter: Some(filter) };
    let images = t.im().list_images(request).await.context("ListImages")?.into_inner().images;
    anyhow::ensure!(images.iter().any(|image| image.id == id), "the filtered list lacks the image");
    Ok(())
}

async fn second_pull(t: T) -> Result<()> {
    let registry = t.suite.catalog.registry()?;
    let reference = format!("{}:1", own(&t, "list")?);
    pulled(&t, &reference).await?;
    let before = registry.asked("GET /v2/conformance/image-list/blobs/");
    pulled(&t, &reference).await?;
    same("blobs fetched", registry.asked("GET /v2/conformance/image-list/blobs/"), before)
}

async fn fs_info(t: T) -> Result<()> {
    let answer = t.im().image_fs_info(v1::ImageFsInfoRequest {}).await.context("ImageFsInfo")?.into_inner();
    let first = answer.image_filesystems.first().context("no file system")?;
    let mountpoint = first.fs_id.clone().unwrap_or_default().mountpoint;
    anyhow::ensure!(std::path::Path::new(&mountpoint).is_dir(), "{mountpoint:?} is no directory");
    anyhow::ensure!(first.timestamp > 0, "no time");
    t.until("bytes and inodes are counted", || async {
        let answer =
            t.im().image_fs_info(v1::ImageFsInfoRequest {}).await.context("ImageFsInfo")?.into_inner();
        let first = answer.image_filesystems.first().cloned().unwrap_or_default();
        let counted = [first.used_bytes, first.inodes_used];
        Ok(counted.iter().all(|count| count.is_some_and(|count| count.value > 0)).then_some(()))
    })
    .await
}

async fn stream(t: T) -> Result<()> {
    pulled(&t, &format!("{}:1", own(&t, "list")?)).await?;
    let mut stream =
        t.im().stream_images(v1::StreamImagesRequest::default()).await.context("StreamImages")?.into_inner();
    let mut ids = Vec::new();
    while let Some(message) = stream.message().await.context("StreamImages")? {
        ids.extend(message.images.into_iter().map(|image| image.id));
    }
    let mut listed: Vec<String> = list(&t).await?.into_iter().map(|image| image.id).collect();
    ids.sort();
    listed.sort();
    same("the ids", ids, listed)
}

async fn pull_deadline(t: T) -> Result<()> {
    let registry = t.suite.catalog.registry()?;
    let (repository, reference) =
        ("conformance/image-stall-deadline", format!("{}:1", own(&t, "stall-deadline")?));
    t.remember_image(&reference);
    registry.stall(repository, true);
    let mut request = tonic::Request::new(v1::PullImageRequest {
        image: Some(image_spec(&reference)),
        ..v1::PullImageRequest::default()
    });
    request.set_timeout(Duration::from_secs(3));
    let late = t.im().pull_image(request).await;
    registry.stall(repository, false);
    // A client counts for itself, too, and says it was cancelled.
    let codes = [tonic::Code::DeadlineExceeded, tonic::Code::Cancelled];
    refused_with("a pull of what does not come", late, &codes)?;
    same("the image's status", t.image(&reference).await?, None)?;
    // What goes on behind a caller that gave up is joined, and may fail once more.
    t.until("a later pull succeeds", || async { Ok(t.try_pull(&reference, None).await.ok()) }).await.map(drop)
}

/// How long an endpoint is waited for to give a pull up; containerd and keelson-cri take 5 minutes unless configured.
const NO_PROGRESS: Duration = Duration::from_secs(30);

async fn no_progress(t: T) -> Result<()> {
    let registry = t.suite.catalog.registry()?;
    let (repository, reference) =
        ("conformance/image-stall-progress", format!("{}:1", own(&t, "stall-progress")?));
    registry.stall(repository, true);
    let answer = tokio::time::timeout(NO_PROGRESS, t.try_pull(&reference, None)).await;
    registry.stall(repository, false);
    let Ok(answer) = answer else {
        return skip(format!("the endpoint still waits after {} s", NO_PROGRESS.as_secs()));
    };
    refused_with("a pull without progress", answer, &[tonic::Code::DeadlineExceeded])?;
    same("the image's status", t.image(&reference).await?, None)?;
    pulled(&t, &reference).await.map(drop)
}

async fn five_removals(t: T) -> Result<()> {
    let reference = format!("{}:1", own(&t, "race")?);
    pulled(&t, &reference).await?;
    let calls = (0..5).map(|_| t.remove_image(&reference));
    futures::future::try_join_all(calls).await?;
    same("the image", t.image(&reference).await?, None)
}

async fn five_pulls(t: T) -> Result<()> {
    let reference = format!("{}:2", own(&t, "race")?);
    let mut ids = futures::future::try_join_all((0..5).map(|_| t.try_pull(&reference, None)))
        .await
        .context("PullImage")?;
    ids.dedup();
    same("different ids", ids.len(), 1)
}

async fn list_after(t: T) -> Result<()> {
    let reference = format!("{}:1", own(&t, "consistency")?);
    for _ in 0..3 {
        let (id, _) = pulled(&t, &reference).await?;
        anyhow::ensure!(
            list(&t).await?.iter().any(|image| image.id == id),
            "not listed right after the pull"
        );
        t.remove_image(&reference).await?;
        anyhow::ensure!(list(&t).await?.iter().all(|image| image.id != id), "listed right after the removal");
    }
    Ok(())
}

async fn remove_in_use(t: T) -> Result<()> {
    let reference = t.suite.catalog.reference("conformance/user-pair:latest")?;
    let id = t.try_pull(&reference, None).await.context("PullImage")?;
    let (_, container) = t.idle_with(|config| config.image = Some(image_spec(&id))).await?;
    t.remove_image(&reference).await?;
    same("the container", t.sh(&container, "echo alive").await?.as_str(), "alive")
}

async fn identifiers(t: T) -> Result<()> {
    let reference = t.suite.catalog.reference("conformance/busybox:1.36")?;
    let pulled = t.pull(&reference).await?;
    let image = t.image(&reference).await?.context("no status")?;
    same("Image.id", image.id, pulled.clone())?;
    let (_, container) = t.idle_with(|config| config.image = Some(image_spec(&pulled))).await?;
    let status = t.status(&container).await?;
    same("ContainerStatus.image_id", status.image_id, pulled.clone())?;
    let filter = v1::ContainerFilter { id: container, ..Default::default() };
    let listed = super::container::list(&t, filter).await?;
    same("Container.image_id", listed.first().map(|item| item.image_id.clone()), Some(pulled))
}

fn private(t: &T) -> Result<String> {
    t.suite.catalog.reference("private/image:latest")
}

async fn no_credentials(t: T) -> Result<()> {
    refused("a pull without credentials", t.try_pull(&private(&t)?, None).await).map(drop)
}

fn auth(password: &str) -> v1::AuthConfig {
    v1::AuthConfig { username: USER.to_owned(), password: password.to_owned(), ..v1::AuthConfig::default() }
}

async fn credentials(t: T) -> Result<()> {
    t.try_pull(&private(&t)?, Some(auth(PASSWORD))).await.context("PullImage").map(drop)
}

async fn base64_auth(t: T) -> Result<()> {
    use base64::Engine;
    let pair = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
    let auth = v1::AuthConfig { auth: pair, ..v1::AuthConfig::default() };
    t.try_pull(&private(&t)?, Some(auth)).await.context("PullImage").map(drop)
}

async fn wrong_password(t: T) -> Result<()> {
    let status = refused("a wrong password", t.try_pull(&private(&t)?, Some(auth("guess"))).await)?;
    anyhow::ensure!(!status.message().contains("guess"), "the error tells the password");
    Ok(())
}

async fn other_server(t: T) -> Result<()> {
    let auth = v1::AuthConfig { server_address: "registry.example".to_owned(), ..auth(PASSWORD) };
    refused("credentials of another server", t.try_pull(&private(&t)?, Some(auth)).await).map(drop)
}

async fn this_server(t: T) -> Result<()> {
    let server_address = format!("http://{}", t.suite.catalog.registry()?.address);
    let auth = v1::AuthConfig { server_address, ..auth(PASSWORD) };
    t.try_pull(&private(&t)?, Some(auth)).await.context("PullImage").map(drop)
}

async fn malformed_references(t: T) -> Result<()> {
    let long = format!("a/{}", "b".repeat(5000));
    for reference in
        ["", "UPPER/Case", "a b", "a:b:c:d", "name@sha256:short", "http://host/image", "../x", &long]
    {
        refused(&format!("{reference:.40?}"), t.try_pull(reference, None).await)?;
    }
    Ok(())
}

async fn unknown_tag(t: T) -> Result<()> {
    let reference = format!("{}:nobody-has-this", own(&t, "list")?);
    holds(
        "the error",
        refused("an unknown tag", t.try_pull(&reference, None).await)?.message(),
        "nobody-has-this",
    )
}

async fn no_registry(t: T) -> Result<()> {
    refused("a registry that is not there", t.try_pull("127.0.0.1:1/a/b:c", None).await).map(drop)
}

async fn broken(t: T, name: &str) -> Result<()> {
    let reference = t.suite.catalog.reference(&format!("{name}:latest"))?;
    refused("the image", t.try_pull(&reference, None).await)?;
    same("the image's status", t.image(&reference).await?, None)
}

/// Refused or kept inside: both are fine, a file outside is not.
async fn hostile(t: T, name: &str) -> Result<()> {
    let outside = t.suite.dir.join("escape");
    std::fs::create_dir_all(&outside)?;
    let reference = t.suite.catalog.reference(&format!("{name}:latest"))?;
    t.try_pull(&reference, None).await.ok();
    anyhow::ensure!(!outside.join("planted").exists(), "the layer wrote to {}", outside.display());
    Ok(())
}

async fn hard_link(t: T) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let outside = t.suite.dir.join("escape");
    std::fs::create_dir_all(&outside)?;
    std::fs::write(outside.join("secret"), "secret\n")?;
    let reference = t.suite.catalog.reference("hostile/hard-link:latest")?;
    t.try_pull(&reference, None).await.ok();
    same("links to the file outside", std::fs::metadata(outside.join("secret"))?.nlink(), 1)
}
