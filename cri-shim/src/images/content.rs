//! containerd's content store: read small blobs, stream large ones in, label them.
//!
//! Input: digests and bytes. Output: blobs stored under their digest, which containerd verifies at commit. At most
//! [`IN_FLIGHT`] messages of [`CHUNK`] bytes of a blob are under way at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::{
    AbortRequest, Info, ReadContentRequest, UpdateRequest, WriteAction, WriteContentRequest,
    WriteContentResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::feed::Feed;
use super::pull::PullError;
use super::registry::MAX_DOCUMENT;
use super::session::{CALL_DEADLINE, CallError, Session, allow, call, failed};

/// Bytes sent to containerd in one message.
pub const CHUNK: usize = 512 * 1024;

/// Messages of a blob that containerd has not answered yet.
const IN_FLIGHT: u32 = 3;

/// How long containerd may take to store one chunk.
const CHUNK_DEADLINE: Duration = Duration::from_secs(60);

const WRITE: &str = "write content";

/// How long containerd may take to hash and move a finished blob.
const COMMIT_DEADLINE: Duration = Duration::from_secs(300);

/// How often, and at what pace, a write that another writer still holds is tried again.
const LOCKED_RETRIES: (u32, Duration) = (20, Duration::from_millis(250));

/// Reads a small blob whole.
pub async fn read(session: &Session, digest: &str) -> Result<Vec<u8>, CallError> {
    const STEP: &str = "read content";
    let message = ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 };
    let mut client = ContentClient::new(session.channel());
    let mut stream = call(STEP, digest, client.read(session.request(message, CALL_DEADLINE))).await?;
    let mut bytes = Vec::new();
    while let Some(part) = stream.message().await.map_err(|status| failed(STEP, digest, status))? {
        bytes.extend_from_slice(&part.data);
        if bytes.len() > MAX_DOCUMENT {
            let status = Status::resource_exhausted(format!("longer than {MAX_DOCUMENT} bytes"));
            return Err(failed(STEP, digest, status));
        }
    }
    Ok(bytes)
}

/// Reads a stored layer into a thread that unpacks it.
pub async fn read_into(session: &Session, digest: &str, feed: &mut Feed) -> Result<(), PullError> {
    const STEP: &str = "read content";
    let message = ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 };
    let mut client = ContentClient::new(session.channel());
    // No deadline for the whole, which takes as long as unpacking does.
    let opened = within(CALL_DEADLINE, client.read(session.streaming(message))).await;
    let mut stream = opened.map_err(|status| failed(STEP, digest, status))?.into_inner();
    loop {
        let part = within(CHUNK_DEADLINE, stream.message()).await;
        match part.map_err(|status| failed(STEP, digest, status))? {
            Some(part) => feed.give(part.data.into()).await?,
            None => return Ok(()),
        }
    }
}

/// Sets labels of a stored blob and keeps its others.
pub async fn label(
    session: &Session,
    digest: &str,
    labels: BTreeMap<String, String>,
) -> Result<(), CallError> {
    let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
    let labels = labels.into_iter().collect();
    let info = Info { digest: digest.to_owned(), labels, ..Info::default() };
    let message = UpdateRequest { info: Some(info), update_mask: Some(prost_types::FieldMask { paths }) };
    let mut client = ContentClient::new(session.channel());
    call("label content", digest, client.update(session.request(message, CALL_DEADLINE))).await.map(drop)
}

/// Stores a small blob with its labels; a blob that is there already only gets the labels.
pub async fn store(
    session: &Session,
    digest: &str,
    bytes: Vec<u8>,
    labels: BTreeMap<String, String>,
) -> Result<(), CallError> {
    if let Some(mut writer) = Writer::open_empty(session, digest, bytes.len() as u64, &labels).await? {
        for part in bytes.chunks(CHUNK) {
            writer.write(part).await?;
        }
        writer.commit(labels.clone()).await?;
    }
    if labels.is_empty() { Ok(()) } else { label(session, digest, labels).await }
}

/// A blob being written. Dropping it keeps what has arrived, for a later writer to go on from.
pub struct Writer {
    session: Session,
    digest: String,
    total: u64,
    /// Bytes sent; containerd has them all once nothing is in flight.
    offset: u64,
    in_flight: u32,
    requests: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
}

impl Writer {
    /// Begins or resumes writing `digest`; `None` when the blob is complete already (and now under the lease).
    pub async fn open(session: &Session, digest: &str, total: u64) -> Result<Option<Self>, CallError> {
        let mut tries = 0;
        loop {
            match Self::try_open(session, digest, total).await {
                // The writer of a caller that just went away is let go in a moment.
                Err(error) if error.code() == Code::Unavailable && tries < LOCKED_RETRIES.0 => {
                    tries += 1;
                    tokio::time::sleep(LOCKED_RETRIES.1).await;
                }
                result => return allow(result, Code::AlreadyExists),
            }
        }
    }

    /// Begins writing `digest` from its first byte; `None` when the blob is complete, with `labels` where it was new here.
    pub async fn open_empty(
        session: &Session,
        digest: &str,
        total: u64,
        labels: &BTreeMap<String, String>,
    ) -> Result<Option<Self>, CallError> {
        match Self::open(session, digest, total).await? {
            // Another namespace, or garbage not collected yet, has all of it; writing would append a second copy.
            Some(writer) if writer.offset == total => writer.commit(labels.clone()).await.map(|()| None),
            Some(writer) if writer.offset > 0 => writer.restart().await.map(Some),
            opened => Ok(opened),
        }
    }

    async fn try_open(session: &Session, digest: &str, total: u64) -> Result<Self, CallError> {
        const STEP: &str = "begin writing content";
        let (requests, receiver) = mpsc::channel(1);
        let first = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: ingest_name(digest),
            total: signed(total),
            expected: digest.to_owned(),
            ..WriteContentRequest::default()
        };
        let closed = |_closed| failed(STEP, digest, Status::internal("the write stream ended"));
        requests.send(first).await.map_err(closed)?;
        let mut client = ContentClient::new(session.channel());
        let stream = session.streaming(ReceiverStream::new(receiver));
        let opened = async {
            let mut answers = client.write(stream).await?.into_inner();
            let first =
                answers.message().await?.ok_or_else(|| Status::internal("no answer to the first message"))?;
            Ok((answers, first))
        };
        let (answers, first) =
            within(CHUNK_DEADLINE, opened).await.map_err(|status| failed(STEP, digest, status))?;
        Ok(Self {
            session: session.clone(),
            digest: digest.to_owned(),
            total,
            offset: unsigned(first.offset),
            in_flight: 0,
            requests,
            answers,
        })
    }

    /// How many bytes were given.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Appends `data`. An error of it may come with a later piece or with [`Writer::settle`].
    pub async fn write(&mut self, data: impl Into<Vec<u8>>) -> Result<(), CallError> {
        while self.in_flight >= IN_FLIGHT {
            self.answer().await?;
        }
        let data: Vec<u8> = data.into();
        let length = data.len() as u64;
        let message = WriteContentRequest {
            action: WriteAction::Write.into(),
            offset: signed(self.offset),
            data,
            ..WriteContentRequest::default()
        };
        let sent = within(CHUNK_DEADLINE, async { Ok(self.requests.send(message).await.is_ok()) }).await;
        self.in_flight += 1;
        self.offset += length;
        if !sent.map_err(|status| failed(WRITE, &self.digest, status))? {
            // A closed stream says why in its next answer.
            return self.settle().await;
        }
        Ok(())
    }

    /// Waits until containerd has all that was given.
    pub async fn settle(&mut self) -> Result<(), CallError> {
        while self.in_flight > 0 {
            self.answer().await?;
        }
        Ok(())
    }

    async fn answer(&mut self) -> Result<(), CallError> {
        let next =
            async { self.answers.message().await?.ok_or_else(|| Status::internal("the write stream ended")) };
        let answer =
            within(CHUNK_DEADLINE, next).await.map_err(|status| failed(WRITE, &self.digest, status))?;
        self.in_flight -= 1;
        if self.in_flight == 0 && unsigned(answer.offset) != self.offset {
            let status = Status::data_loss(format!("it stored {} of {} bytes", answer.offset, self.offset));
            return Err(failed(WRITE, &self.digest, status));
        }
        Ok(())
    }

    /// Ends the blob; containerd checks length and digest.
    pub async fn commit(mut self, labels: BTreeMap<String, String>) -> Result<(), CallError> {
        self.settle().await?;
        let message = WriteContentRequest {
            action: WriteAction::Commit.into(),
            offset: signed(self.offset),
            total: signed(self.total),
            expected: self.digest.clone(),
            labels: labels.into_iter().collect(),
            ..WriteContentRequest::default()
        };
        let result = self.exchange("commit content", message, COMMIT_DEADLINE).await;
        allow(result, Code::AlreadyExists).map(drop)
    }

    /// Throws away what is stored.
    pub async fn discard(mut self) -> Result<(), CallError> {
        // What is still being written would come in between; how it ends is of no interest any more.
        self.settle().await.ok();
        let Self { session, digest, requests, answers, .. } = self;
        drop((requests, answers));
        abort(&session, &digest).await
    }

    /// Throws away what is stored and begins anew.
    pub async fn restart(self) -> Result<Self, CallError> {
        let (session, digest, total) = (self.session.clone(), self.digest.clone(), self.total);
        self.discard().await?;
        let reopened = Self::open(&session, &digest, total).await?;
        reopened.ok_or_else(|| {
            failed(
                "begin writing content",
                &digest,
                Status::already_exists("another writer finished it meanwhile"),
            )
        })
    }

    async fn exchange(
        &mut self,
        step: &'static str,
        message: WriteContentRequest,
        deadline: Duration,
    ) -> Result<WriteContentResponse, CallError> {
        let Self { requests, answers, .. } = self;
        let exchange = async {
            // A closed stream says why in its next answer.
            let sent = requests.send(message).await;
            match answers.message().await? {
                Some(answer) if sent.is_ok() => Ok(answer),
                _ => Err(Status::internal("the write stream ended")),
            }
        };
        within(deadline, exchange).await.map_err(|status| failed(step, &self.digest, status))
    }
}

/// Throws away what was written of a blob that was never committed.
pub async fn abort(session: &Session, digest: &str) -> Result<(), CallError> {
    let mut client = ContentClient::new(session.channel());
    let mut tries = 0;
    loop {
        let message = AbortRequest { r#ref: ingest_name(digest) };
        let request = session.request(message, CALL_DEADLINE);
        let aborted =
            allow(call("abort writing content", digest, client.abort(request)).await, Code::NotFound);
        if aborted.is_ok() || tries == LOCKED_RETRIES.0 {
            return aborted.map(drop);
        }
        // A writer that just went away is let go in a moment.
        tries += 1;
        tokio::time::sleep(LOCKED_RETRIES.1).await;
    }
}

async fn within<T>(deadline: Duration, work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let late = |_elapsed| Status::deadline_exceeded(format!("containerd did not answer within {deadline:?}"));
    tokio::time::timeout(deadline, work).await.map_err(late)?
}

/// One name per blob, so that a later pull goes on where one that died stopped.
fn ingest_name(digest: &str) -> String {
    format!("keelson-blob-{digest}")
}

fn signed(length: u64) -> i64 {
    i64::try_from(length).unwrap_or(i64::MAX)
}

fn unsigned(length: i64) -> u64 {
    u64::try_from(length).unwrap_or(0)
}
