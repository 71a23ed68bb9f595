//! One SPDY connection: a reader and a writer task, and the [`Stream`]s that the client opens.
//!
//! Input: an upgraded byte stream. Output: streams with a bounded queue of what the client sends and an [`Output`] for
//! what we send. A queue that nobody empties stops the reading, so TCP holds the client back. The reader never waits for
//! the writer, so neither direction can block the other.
//!
//! Flow control: Kubernetes' clients do none and never send WINDOW_UPDATE, so a window binds our sending only once the
//! peer has sent SETTINGS, as peers that do flow control begin with. We always give windows back.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::SpdyError;
use super::frame::{Decoder, Encoder, Event, Frame, MAX_DATA};
use super::headers::Headers;

/// Pieces of data (of at most [`MAX_DATA`] bytes) that wait for a stream's reader.
const INPUT_QUEUE: usize = 4;

/// Frames that wait for the writer.
const OUTPUT_QUEUE: usize = 4;

/// Answers (replies, pings, windows, resets) that wait for the writer.
const ANSWER_QUEUE: usize = 1024;

/// New streams that wait to be taken.
const STREAM_QUEUE: usize = 16;

/// A stream's window before the peer says otherwise.
const DEFAULT_WINDOW: u32 = 64 * 1024;

/// Largest window.
const MAX_WINDOW: usize = 0x7fff_ffff;

/// Bytes taken from a stream before the peer is told.
const WINDOW_STEP: u32 = 16 * 1024;

/// How often the peer is asked whether it is there: a peer that died while we wait for a queue shows in no read.
const PING_INTERVAL: Duration = Duration::from_secs(30);

/// How long a closed connection waits for the peer to close too, so that it reads all we sent.
const CLOSE_LINGER: Duration = Duration::from_secs(5);

/// Why a stream is refused, section 2.6.3.
const REFUSED_STREAM: u32 = 3;

/// A connection being served. Dropping it cuts it.
pub struct Connection {
    outgoing: mpsc::Sender<Frame>,
    gone: CancellationToken,
    reader: AbortOnDropHandle<()>,
    writer: AbortOnDropHandle<()>,
}

/// One stream that the client opened; it was accepted already.
pub struct Stream {
    /// What it is for.
    pub headers: Headers,
    /// What the client sends, until it ends its direction, cuts the stream or is gone.
    pub input: mpsc::Receiver<Bytes>,
    /// What we send.
    pub output: Output,
}

/// Our direction of a stream.
pub struct Output {
    id: u32,
    outgoing: mpsc::Sender<Frame>,
    window: Arc<Window>,
    state: Arc<OutputState>,
}

/// The client cut the stream or is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client closed the stream")]
pub struct Closed;

#[derive(Default)]
struct OutputState {
    finished: AtomicBool,
    cut: CancellationToken,
}

struct Window {
    binding: Arc<AtomicBool>,
    credit: Semaphore,
}

impl Connection {
    /// Serves `io`; streams beyond `max_streams` at a time are refused.
    pub fn serve<T>(io: T, max_streams: usize) -> (Self, mpsc::Receiver<Stream>)
    where
        T: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read, write) = tokio::io::split(io);
        let (outgoing, frames) = mpsc::channel(OUTPUT_QUEUE);
        let (accepted, streams) = mpsc::channel(STREAM_QUEUE);
        let gone = CancellationToken::new();
        let answers = Arc::new(Answers::default());
        let reader = Reader {
            accepted,
            // A strong handle here would keep the writer waiting for frames that nobody can send any more.
            outgoing: outgoing.downgrade(),
            answers: Arc::clone(&answers),
            streams: BTreeMap::new(),
            last_id: 0,
            max_streams,
            initial_window: DEFAULT_WINDOW,
            flow_control: Arc::default(),
        };
        let reader = spawn_until_gone(&gone, reader.run(read));
        let writer = spawn_until_gone(&gone, write_frames(write, frames, answers));
        (Self { outgoing, gone, reader, writer }, streams)
    }

    /// Ends when the client is gone.
    pub fn gone(&self) -> &CancellationToken {
        &self.gone
    }

    /// Sends what is queued, says goodbye and waits a little for the client to close.
    pub async fn close(self) {
        // On failure the writer is gone, and with it the client.
        let said = self.outgoing.send(Frame::GoAway { last: 0 }).await;
        if said.is_ok() {
            let Self { reader, writer, .. } = self;
            let ended = tokio::time::timeout(CLOSE_LINGER, async { drop(writer.await) }).await;
            if ended.is_ok() {
                drop(tokio::time::timeout(CLOSE_LINGER, reader).await);
            }
        }
    }
}

/// Runs one direction; its failure, or the reader's end, means that the client is gone.
fn spawn_until_gone(
    gone: &CancellationToken,
    work: impl Future<Output = Result<Ended, SpdyError>> + Send + 'static,
) -> AbortOnDropHandle<()> {
    let gone = gone.clone();
    let task: JoinHandle<()> = tokio::spawn(async move {
        // Cancel-safe: whichever side ends, the connection is given up as a whole.
        let result = tokio::select! {
            () = gone.cancelled() => return,
            result = work => result,
        };
        match result {
            Ok(Ended::ByUs) => return,
            Ok(Ended::ByPeer) => {}
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "a SPDY connection is cut");
            }
        }
        gone.cancel();
    });
    AbortOnDropHandle::new(task)
}

#[derive(Debug, PartialEq, Eq)]
enum Ended {
    ByUs,
    ByPeer,
}

impl Output {
    /// Sends `bytes`, waiting while the client takes none.
    pub async fn send(&self, mut bytes: Bytes) -> Result<(), Closed> {
        while !bytes.is_empty() {
            let mut piece = bytes.split_to(bytes.len().min(MAX_DATA));
            if self.window.binding.load(Ordering::Relaxed) {
                let taken = self.take_window(piece.len()).await?;
                let rest = piece.split_off(taken);
                if !rest.is_empty() {
                    let mut joined = BytesMut::from(&rest[..]);
                    joined.extend_from_slice(&bytes);
                    bytes = joined.freeze();
                }
            }
            self.frame(piece, false).await?;
        }
        Ok(())
    }

    /// Ends our direction.
    pub async fn finish(&self) {
        // A client that is gone needs no end.
        if !self.state.finished.swap(true, Ordering::Relaxed) && self.frame(Bytes::new(), true).await.is_err()
        {
            tracing::trace!(stream = self.id, "the client left before its stream ended");
        }
    }

    /// Ends when the client cuts the stream.
    pub async fn cut(&self) {
        self.state.cut.cancelled().await;
    }

    async fn frame(&self, bytes: Bytes, fin: bool) -> Result<(), Closed> {
        if self.state.cut.is_cancelled() {
            return Err(Closed);
        }
        self.outgoing.send(Frame::Data { id: self.id, bytes, fin }).await.map_err(|_gone| Closed)
    }

    /// Waits for at least one byte of window and takes up to `wanted`.
    async fn take_window(&self, wanted: usize) -> Result<usize, Closed> {
        // Cancel-safe: an abandoned wait takes nothing.
        let first = tokio::select! {
            first = self.window.credit.acquire() => first.map_err(|_gone| Closed)?,
            () = self.state.cut.cancelled() => return Err(Closed),
            () = self.outgoing.closed() => return Err(Closed),
        };
        first.forget();
        let more = u32::try_from(self.window.credit.available_permits().min(wanted - 1)).unwrap_or(0);
        match self.window.credit.try_acquire_many(more) {
            Ok(permits) => permits.forget(),
            Err(_) => return Ok(1),
        }
        Ok(1 + usize::try_from(more).unwrap_or(0))
    }
}

/// What the reader wants written, without waiting for it.
#[derive(Default)]
struct Answers {
    queue: Mutex<VecDeque<Frame>>,
    more: Notify,
}

impl Answers {
    fn push(&self, frame: Frame) -> Result<(), SpdyError> {
        {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            if queue.len() >= ANSWER_QUEUE {
                return Err(SpdyError::Flood);
            }
            queue.push_back(frame);
        }
        self.more.notify_one();
        Ok(())
    }

    fn pop(&self) -> Option<Frame> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

struct Entry {
    input: Option<mpsc::Sender<Bytes>>,
    window: Arc<Window>,
    output: Arc<OutputState>,
    taken: u32,
}

impl Entry {
    fn is_over(&self) -> bool {
        let nobody_reads = self.input.as_ref().is_none_or(mpsc::Sender::is_closed);
        self.output.cut.is_cancelled() || (nobody_reads && self.output.finished.load(Ordering::Relaxed))
    }
}

struct Reader {
    accepted: mpsc::Sender<Stream>,
    outgoing: mpsc::WeakSender<Frame>,
    answers: Arc<Answers>,
    streams: BTreeMap<u32, Entry>,
    last_id: u32,
    max_streams: usize,
    initial_window: u32,
    flow_control: Arc<AtomicBool>,
}

impl Reader {
    async fn run(mut self, mut read: impl AsyncRead + Unpin) -> Result<Ended, SpdyError> {
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::new();
        loop {
            while let Some(event) = decoder.decode(&mut buffer)? {
                self.handle(event).await?;
            }
            buffer.reserve(MAX_DATA);
            if read.read_buf(&mut buffer).await? == 0 {
                return Ok(Ended::ByPeer);
            }
        }
    }

    async fn handle(&mut self, event: Event) -> Result<(), SpdyError> {
        match event {
            Event::SynStream { id, headers, fin } => self.open(id, headers, fin).await,
            Event::Data { id, bytes, fin } => self.data(id, bytes, fin).await,
            Event::Reset { id } => {
                if let Some(entry) = self.streams.remove(&id) {
                    entry.output.cut.cancel();
                }
                Ok(())
            }
            // Odd questions are the client's; even ones answer ours.
            Event::Ping(id) if !id.is_multiple_of(2) => self.answers.push(Frame::Ping(id)),
            Event::Settings { initial_window } => {
                self.flow_control.store(true, Ordering::Relaxed);
                self.initial_window = initial_window.unwrap_or(self.initial_window);
                Ok(())
            }
            Event::WindowUpdate { id, delta } => {
                let Some(entry) = self.streams.get(&id) else { return Ok(()) };
                let delta = usize::try_from(delta).unwrap_or(MAX_WINDOW);
                if entry.window.credit.available_permits() + delta > MAX_WINDOW {
                    return Err(SpdyError::Window(id));
                }
                entry.window.credit.add_permits(delta);
                Ok(())
            }
            Event::Ping(_) | Event::GoAway | Event::Ignored => Ok(()),
        }
    }

    async fn open(&mut self, id: u32, headers: Headers, fin: bool) -> Result<(), SpdyError> {
        if id.is_multiple_of(2) || id <= self.last_id {
            return Err(SpdyError::StreamId(id));
        }
        self.last_id = id;
        self.streams.retain(|_, entry| !entry.is_over());
        let outgoing = match self.outgoing.upgrade() {
            Some(outgoing) if self.streams.len() < self.max_streams => outgoing,
            _ => return self.answers.push(Frame::Reset { id, status: REFUSED_STREAM }),
        };
        let (input, receiver) = mpsc::channel(INPUT_QUEUE);
        let window = Arc::new(Window {
            binding: Arc::clone(&self.flow_control),
            credit: Semaphore::new(usize::try_from(self.initial_window).unwrap_or(MAX_WINDOW)),
        });
        let state = Arc::new(OutputState::default());
        let entry = Entry {
            input: (!fin).then_some(input),
            window: Arc::clone(&window),
            output: Arc::clone(&state),
            taken: 0,
        };
        self.streams.insert(id, entry);
        self.answers.push(Frame::SynReply { id })?;
        let stream = Stream { headers, input: receiver, output: Output { id, outgoing, window, state } };
        if self.accepted.send(stream).await.is_err() {
            self.streams.remove(&id);
            return self.answers.push(Frame::Reset { id, status: REFUSED_STREAM });
        }
        Ok(())
    }

    async fn data(&mut self, id: u32, bytes: Bytes, fin: bool) -> Result<(), SpdyError> {
        // Late data of a stream that is over is dropped; of one that never was, the peer is mad.
        let Some(entry) = self.streams.get_mut(&id) else {
            return if id <= self.last_id { Ok(()) } else { Err(SpdyError::StreamId(id)) };
        };
        entry.taken += u32::try_from(bytes.len()).unwrap_or(0);
        if let (Some(input), false) = (&entry.input, bytes.is_empty()) {
            // A reader that stopped reading does not stop the others.
            if input.send(bytes).await.is_err() {
                entry.input = None;
            }
        }
        if fin {
            entry.input = None;
        }
        if entry.taken >= WINDOW_STEP && !fin {
            let delta = std::mem::take(&mut entry.taken);
            self.answers.push(Frame::WindowUpdate { id, delta })?;
        }
        Ok(())
    }
}

async fn write_frames(
    mut write: impl AsyncWrite + Unpin,
    mut frames: mpsc::Receiver<Frame>,
    answers: Arc<Answers>,
) -> Result<Ended, SpdyError> {
    let mut encoder = Encoder::default();
    let mut buffer = BytesMut::new();
    let mut ping = tokio::time::interval(PING_INTERVAL);
    ping.reset();
    let mut ping_id = 0_u32;
    loop {
        // Cancel-safe: each arm only receives; what was received is written below.
        let frame = tokio::select! {
            biased;
            () = answers.more.notified() => None,
            frame = frames.recv() => Some(frame),
            _ = ping.tick() => {
                ping_id = ping_id.wrapping_add(2);
                Some(Some(Frame::Ping(ping_id)))
            }
        };
        while let Some(answer) = answers.pop() {
            encoder.encode(&answer, &mut buffer)?;
        }
        let last = match frame {
            None => false,
            Some(None) => true,
            Some(Some(frame)) => {
                encoder.encode(&frame, &mut buffer)?;
                matches!(frame, Frame::GoAway { .. })
            }
        };
        write.write_all_buf(&mut buffer).await?;
        write.flush().await?;
        if last {
            write.shutdown().await?;
            return Ok(Ended::ByUs);
        }
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
