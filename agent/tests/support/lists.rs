//! A pretended API server that lists what it was given; its watches tell nothing.

use std::{collections::HashMap, convert::Infallible, sync::Arc};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use kube::client::Body;
use serde_json::{Value, json};

/// Its client, with the objects of each kind by the plural of its name.
pub(crate) fn client<const N: usize>(lists: [(&'static str, Vec<Value>); N]) -> kube::Client {
    type Answer = UnsyncBoxBody<Bytes, Infallible>;
    let lists = Arc::new(HashMap::from(lists));
    let service = tower::service_fn(move |request: Request<Body>| {
        let plural = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        let body: Answer = if request.uri().query().unwrap_or_default().contains("watch=true") {
            StreamBody::new(futures::stream::pending()).boxed_unsync()
        } else {
            let items = lists.get(plural.as_str()).cloned().unwrap_or_default();
            let meta = json!({"resourceVersion": "1"});
            let list = json!({"kind": "List", "apiVersion": "v1", "metadata": meta, "items": items});
            Full::from(list.to_string()).boxed_unsync()
        };
        async move { Ok::<_, Infallible>(Response::new(body)) }
    });
    kube::Client::new(service, "default")
}
