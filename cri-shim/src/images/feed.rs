//! Unpacks a layer on a thread of its own while it arrives.
//!
//! Input: the layer's pieces in order. Output: what [`untar::apply`] made of them. At most [`QUEUE`] pieces wait, so a slow
//! disk slows the network down instead of filling memory. A thread that is no longer fed ends by itself.

use std::io::{self, Read};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::decode::Meter;
use super::progress::Progress;
use super::unpack::{Layer, UnpackError};
use super::untar::merge::Target;
use super::untar::{self, Applied, ApplyError};

/// Pieces that wait for the thread.
const QUEUE: usize = 4;

/// A layer being unpacked.
pub struct Feed {
    /// The layer's digest, for messages.
    layer: String,
    /// `None` once the thread wants no more.
    sender: Option<mpsc::Sender<Piece>>,
    thread: JoinHandle<Outcome>,
    /// How the thread failed, where that is known already.
    failure: Option<ApplyError>,
    given: u64,
    spoilt: bool,
}

type Outcome = Result<Applied, ApplyError>;

enum Piece {
    Bytes(Bytes),
    End,
}

impl Feed {
    /// Starts a thread that fills `target`.
    pub fn start(
        threads: &TaskTracker,
        layer: &Layer,
        target: &Target,
        meter: Meter,
        progress: Progress,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let directory = target.upper.clone();
        let whiteouts =
            if layer.parent.is_empty() { untar::Whiteouts::Remove } else { untar::Whiteouts::Overlay };
        let reader = Pieces { receiver, current: Bytes::new(), ended: false, progress };
        let thread = threads.spawn_blocking(move || untar::apply(reader, &directory, whiteouts, meter));
        Self { layer: layer.digest(), sender: Some(sender), thread, failure: None, given: 0, spoilt: false }
    }

    /// Bytes given so far: where the next piece must begin.
    pub fn given(&self) -> u64 {
        self.given
    }

    /// Gives a piece. A layer beyond its limits is refused at once; with any other failure the pieces are dropped, because
    /// only when all have arrived it is known whether they were the right ones. [`Feed::end`] tells it then.
    pub async fn give(&mut self, piece: Bytes) -> Result<(), UnpackError> {
        self.given += piece.len() as u64;
        let Some(sender) = &self.sender else { return Ok(()) };
        if sender.send(Piece::Bytes(piece)).await.is_ok() {
            return Ok(());
        }
        self.sender = None;
        match (&mut self.thread).await? {
            Err(limit @ ApplyError::Limit(_)) => {
                Err(UnpackError::Apply { layer: self.layer.clone(), source: limit })
            }
            Err(other) => {
                self.failure = Some(other);
                Ok(())
            }
            // It does not stop early without a failure.
            Ok(_) => Ok(()),
        }
    }

    /// Tells that what was given so far is not the layer.
    pub fn spoil(&mut self) {
        self.spoilt = true;
    }

    /// Whether exactly the `size` bytes of the layer were given.
    pub fn has_all_of(&self, size: u64) -> bool {
        !self.spoilt && self.given == size
    }

    /// Tells that the layer is complete and waits for the result.
    pub async fn end(mut self) -> Result<Outcome, UnpackError> {
        if let Some(failure) = self.failure.take() {
            return Ok(Err(failure));
        }
        if let Some(sender) = self.sender.take() {
            // A thread that has failed says so itself.
            drop(sender.send(Piece::End).await);
        }
        Ok(self.thread.await?)
    }

    /// Gives up and waits until nothing is written any more.
    pub async fn give_up(mut self) -> Result<(), UnpackError> {
        drop(self.sender.take());
        if self.failure.is_none() {
            drop(self.thread.await?);
        }
        Ok(())
    }
}

struct Pieces {
    receiver: mpsc::Receiver<Piece>,
    current: Bytes,
    ended: bool,
    progress: Progress,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.receiver.blocking_recv() {
                Some(Piece::Bytes(bytes)) => self.current = bytes,
                Some(Piece::End) => self.ended = true,
                None => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the transfer was given up"));
                }
            }
        }
        let count = buffer.len().min(self.current.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        self.progress.tick();
        Ok(count)
    }
}
