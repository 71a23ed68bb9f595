//! The content store: blobs by digest, written as a checked stream.

use std::collections::HashMap;

use bytes::Bytes;
use containerd_client::services::v1::{
    AbortRequest, Info, InfoRequest, ReadContentRequest, UpdateRequest, WriteAction, WriteContentRequest,
};
use futures::{Stream, StreamExt};

use super::{Containerd, ContainerdError, METADATA_DEADLINE, TASK_DEADLINE, call};

/// Largest piece of a blob in one message, well below gRPC's usual 4 MiB limit.
pub const CHUNK: usize = 1 << 20;

/// What a written blob must turn out to be.
#[derive(Clone, Debug)]
pub struct ExpectedBlob {
    /// Name of this ingest, unique among the writes under way.
    pub ingest: String,
    /// `sha256:…`.
    pub digest: String,
    /// Size in bytes; 0 when unknown.
    pub size: i64,
    /// Labels the blob gets, such as garbage-collection references.
    pub labels: HashMap<String, String>,
}

impl Containerd {
    /// What the store knows of `digest`, when it has it.
    pub async fn blob_info(&self, digest: &str) -> Result<Option<Info>, ContainerdError> {
        let request = InfoRequest { digest: digest.to_owned() };
        match call("Content.Info", digest, METADATA_DEADLINE, self.content_client().info(request)).await {
            Ok(answer) => Ok(answer.info),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The whole blob; meant for manifests and configurations, refused above `limit` bytes.
    pub async fn read_blob(&self, digest: &str, limit: usize) -> Result<Vec<u8>, ContainerdError> {
        const NAME: &str = "Content.Read";
        let request = ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 };
        let mut stream = call(NAME, digest, METADATA_DEADLINE, self.content_client().read(request)).await?;
        let mut blob = Vec::new();
        let fill = async {
            while let Some(piece) = stream.message().await? {
                if blob.len() + piece.data.len() > limit {
                    return Err(tonic::Status::resource_exhausted(format!("larger than {limit} bytes")));
                }
                blob.extend_from_slice(&piece.data);
            }
            Ok(tonic::Response::new(()))
        };
        call(NAME, digest, METADATA_DEADLINE, fill).await?;
        Ok(blob)
    }

    /// Writes a blob from `pieces`; containerd checks digest and size. One that is there already is fine.
    ///
    /// A source that fails in the middle (`Err`) ends the write without a commit and gives that error back.
    pub async fn write_blob<E: std::error::Error + Send + 'static>(
        &self,
        expected: &ExpectedBlob,
        pieces: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    ) -> Result<Result<(), E>, ContainerdError> {
        const NAME: &str = "Content.Write";
        let (failed, mut failure) = tokio::sync::oneshot::channel();
        let requests = write_requests(expected.clone(), pieces, failed);
        let mut answers =
            match call(NAME, &expected.digest, TASK_DEADLINE, self.content_client().write(requests)).await {
                Err(error) if error.is_already_exists() => return Ok(Ok(())),
                other => other?,
            };
        loop {
            match answers.message().await {
                Ok(Some(answer)) if answer.action == i32::from(WriteAction::Commit) => return Ok(Ok(())),
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(status) if status.code() == tonic::Code::AlreadyExists => return Ok(Ok(())),
                Err(status) => return Err(ContainerdError::call(NAME, &expected.digest, status)),
            }
        }
        self.abort_write(&expected.ingest).await?;
        match failure.try_recv() {
            Ok(error) => Ok(Err(error)),
            Err(_) => Err(ContainerdError::Incomplete {
                call: NAME,
                object: expected.digest.clone(),
                missing: "commit",
            }),
        }
    }

    /// Drops a write that was left in the middle; none is fine.
    pub async fn abort_write(&self, ingest: &str) -> Result<(), ContainerdError> {
        let request = AbortRequest { r#ref: ingest.to_owned() };
        let answer =
            call("Content.Abort", ingest, METADATA_DEADLINE, self.content_client().abort(request)).await;
        super::error::gone(answer)
    }

    /// Sets labels of a blob, leaving the others as they are.
    pub async fn label_blob(
        &self,
        digest: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let request = UpdateRequest {
            info: Some(Info { digest: digest.to_owned(), labels, ..Info::default() }),
            update_mask: Some(prost_types::FieldMask { paths }),
        };
        call("Content.Update", digest, METADATA_DEADLINE, self.content_client().update(request)).await?;
        Ok(())
    }
}

/// The stream of write messages: data in order, then the commit. After a failed piece it just ends.
fn write_requests<E: Send + 'static>(
    expected: ExpectedBlob,
    pieces: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    failed: tokio::sync::oneshot::Sender<E>,
) -> impl Stream<Item = WriteContentRequest> + Send + 'static {
    enum Step<S, E> {
        Copy { pieces: S, offset: i64, failed: tokio::sync::oneshot::Sender<E>, rest: Bytes },
        Done,
    }
    let start = Step::Copy { pieces: Box::pin(pieces), offset: 0, failed, rest: Bytes::new() };
    futures::stream::unfold(start, move |step| {
        let base = WriteContentRequest {
            r#ref: expected.ingest.clone(),
            total: expected.size,
            expected: expected.digest.clone(),
            ..WriteContentRequest::default()
        };
        let labels = expected.labels.clone();
        async move {
            let Step::Copy { mut pieces, offset, failed, mut rest } = step else { return None };
            if rest.is_empty() {
                match pieces.next().await {
                    Some(Ok(piece)) => rest = piece,
                    Some(Err(error)) => {
                        // The receiver only goes away together with this stream.
                        drop(failed.send(error));
                        return None;
                    }
                    None => {
                        let commit =
                            WriteContentRequest { action: WriteAction::Commit.into(), offset, labels, ..base };
                        return Some((commit, Step::Done));
                    }
                }
            }
            let data = rest.split_to(rest.len().min(CHUNK));
            let next = offset + i64::try_from(data.len()).unwrap_or(i64::MAX);
            let write =
                WriteContentRequest { action: WriteAction::Write.into(), offset, data: data.into(), ..base };
            Some((write, Step::Copy { pieces, offset: next, failed, rest }))
        }
    })
}
