//! `/containerLogs`: a container's log file as a stream of lines.
//!
//! Input: the CRI log file and the query. Output: the lines, without their prefixes, as chunks; with `follow`, further
//! lines as they are written, across rotation, until the container has ended and its file is read. One task per
//! request reads ahead at most [`QUEUE`] chunks.

mod format;
mod options;
mod reader;

use std::sync::Arc;

use bytes::Bytes;
use cri_shim_streaming::BodyError;
use futures::StreamExt;
use http::{HeaderValue, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::debug;

use self::options::LogOptions;
use self::reader::LogReader;
use super::reply::{self, Reply};
use super::routes::{Api, Query, Target};
use crate::contracts::{ContainerRef, PodLookup};

/// Chunks waiting for the client.
const QUEUE: usize = 8;

/// Answers a request for a container's log.
pub(super) async fn answer(api: &Api, target: Target<'_>, query: &Query) -> Reply {
    let options = match LogOptions::parse(query, jiff::Timestamp::now()) {
        Ok(options) => options,
        Err(message) => return reply::text(StatusCode::BAD_REQUEST, message),
    };
    let found = if options.previous {
        api.state.previous_container(target.namespace, target.pod, target.uid, target.container)
    } else {
        api.state.container(target.namespace, target.pod, target.uid, target.container)
    };
    let container = match found {
        Ok(container) => container,
        Err(error) => return reply::lookup_error(&error),
    };
    let watched = Watched::new(Arc::clone(&api.state), target, &container, options.previous);
    let reader = match LogReader::open(&container.log_path, options).await {
        Ok(reader) => reader,
        Err(error) => {
            let message =
                format!("failed to try resolving symlinks in path {}: {error}", container.log_path.display());
            return reply::text(StatusCode::NOT_FOUND, message);
        }
    };
    let (chunks, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        if let Err(error) = reader.run(&chunks, &watched).await {
            debug!(%error, "log stream ended early");
            // The client sees a broken stream; if it is gone already, nobody needs to know.
            drop(chunks.send(Err(error.into())).await);
        }
    });
    stream(receiver)
}

fn stream(receiver: mpsc::Receiver<Result<Bytes, BodyError>>) -> Reply {
    let frames = ReceiverStream::new(receiver).map(|chunk| chunk.map(Frame::data));
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// The container whose log is followed.
struct Watched {
    state: Arc<dyn PodLookup>,
    namespace: String,
    pod: String,
    uid: String,
    container: String,
    id: String,
    ended: bool,
}

impl Watched {
    fn new(state: Arc<dyn PodLookup>, target: Target<'_>, container: &ContainerRef, previous: bool) -> Self {
        Self {
            state,
            namespace: target.namespace.to_owned(),
            pod: target.pod.to_owned(),
            uid: container.pod_uid.clone(),
            container: target.container.to_owned(),
            id: container.id.clone(),
            ended: previous,
        }
    }

    /// Whether nothing more will be written: it does not run, or another instance has taken its place.
    fn has_ended(&self) -> bool {
        self.ended
            || !self
                .state
                .container(&self.namespace, &self.pod, Some(&self.uid), &self.container)
                .is_ok_and(|container| container.id == self.id && container.running)
    }
}
