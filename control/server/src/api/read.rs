//! `get` and `list`.
//!
//! Reads come from the watch cache once it is as fresh as asked; pages after the first, and exact revisions, come from the store, so that a
//! long list stays one consistent state.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use control_api::{kinds::ResourceInfo, status::ApiError};
use control_store::{Range, Revision, StoreError};
use http::StatusCode;

use super::{
    Api,
    options::{Freshness, ListOptions, Selection},
    render::{self, ListMeta},
    token::ContinueToken,
};
use crate::{
    cache::{NotFresh, Object},
    http::{
        body::{self, Reply},
        negotiate::Form,
    },
};

/// Lists larger than this are sent in pieces.
const CHUNK: usize = 64 << 10;
/// How many pairs are read from the store at a time when a page is filtered.
const STORE_PAGE: usize = 500;

impl Api {
    /// One object, as fresh as asked.
    pub(crate) async fn get_object(
        &self,
        info: &'static ResourceInfo,
        namespace: Option<&str>,
        name: &str,
        freshness: Freshness,
    ) -> Result<Arc<Object>, ApiError> {
        self.wait(freshness).await?;
        self.cached(info, namespace, name).ok_or_else(|| ApiError::not_found(info, name))
    }

    /// One object as the cache has it now.
    pub(crate) fn cached(
        &self,
        info: &ResourceInfo,
        namespace: Option<&str>,
        name: &str,
    ) -> Option<Arc<Object>> {
        let key = match namespace.filter(|_| info.namespaced) {
            Some(namespace) => format!("{namespace}/{name}"),
            None => name.to_owned(),
        };
        self.cache.resource(info)?.get(&key)
    }

    /// Wait until the cache is as fresh as asked; the revision that it then has at least.
    pub(crate) async fn wait(&self, freshness: Freshness) -> Result<Revision, ApiError> {
        let reached = match freshness {
            Freshness::Any => return Ok(self.cache.revision()),
            Freshness::Latest => self.cache.wait_fresh().await.map_err(|error| store_error(&error))?,
            Freshness::AtLeast(revision) | Freshness::Exact(revision) => self.cache.wait_for(revision).await,
        };
        reached
            .map_err(|NotFresh { wanted, current }| ApiError::resource_version_too_large(wanted.0, current.0))
    }

    /// Answer a list.
    pub(crate) async fn list(
        &self,
        info: &'static ResourceInfo,
        options: &ListOptions,
        form: Form,
    ) -> Result<Reply, ApiError> {
        let (objects, meta) = self.page(info, options).await?;
        if let Form::Table(include) = form {
            return Ok(body::json(StatusCode::OK, &render::table(info, &objects, &meta, include)?));
        }
        let head = render::list_head(info, &meta, form);
        let size: usize = objects.iter().map(|object| object.body.len() + 1).sum();
        if size < CHUNK {
            let mut whole = BytesMut::with_capacity(head.len() + size + 2);
            for chunk in list_chunks(info, &head, objects, form) {
                whole.extend_from_slice(&chunk);
            }
            return Ok(body::json_bytes(StatusCode::OK, whole.freeze()));
        }
        let chunks = futures::stream::iter(list_chunks(info, &head, objects, form));
        Ok(body::reply(StatusCode::OK, "application/json", body::stream(chunks)))
    }

    async fn page(
        &self,
        info: &'static ResourceInfo,
        options: &ListOptions,
    ) -> Result<(Vec<Arc<Object>>, ListMeta), ApiError> {
        if !options.token.is_empty() {
            let token = ContinueToken::decode(&options.token)?;
            return self.stored_page(info, options, token.revision(), token.start()).await;
        }
        if let Freshness::Exact(revision) = options.freshness {
            return self.stored_page(info, options, Some(revision), "").await;
        }
        let fresh = self.wait(options.freshness).await?;
        let cache = self.cache.resource(info).ok_or_else(ApiError::unknown_path)?;
        let selection = &options.selection;
        let mut snapshot = cache.snapshot(selection.namespace.as_deref(), |object| selection.matches(object));
        let mut meta = ListMeta { revision: fresh.max(snapshot.newest), ..ListMeta::default() };
        if options.limit > 0 && snapshot.objects.len() > options.limit {
            let remaining = snapshot.objects.len() - options.limit;
            snapshot.objects.truncate(options.limit);
            meta.remaining = selection.is_all().then_some(remaining);
            if let Some(last) = snapshot.objects.last() {
                meta.token = ContinueToken::new(Some(meta.revision), &last.key).encode();
            }
        }
        Ok((snapshot.objects, meta))
    }

    /// A page of the state at a revision, read from the store.
    async fn stored_page(
        &self,
        info: &'static ResourceInfo,
        options: &ListOptions,
        at: Option<Revision>,
        start: &str,
    ) -> Result<(Vec<Arc<Object>>, ListMeta), ApiError> {
        let selection = &options.selection;
        let root = info.list_prefix(None);
        let prefix = Bytes::from(info.list_prefix(selection.namespace.as_deref()));
        let mut after = (!start.is_empty()).then(|| Bytes::from(format!("{root}{start}")));
        let mut at = at;
        let mut objects: Vec<Arc<Object>> = Vec::new();
        loop {
            let range = Range { prefix: prefix.clone(), after: after.clone(), limit: STORE_PAGE, at };
            let page = self.store.range(range).await.map_err(|error| expired_list(&error, info, start))?;
            // Later steps of this page must show the same state.
            at = Some(page.revision);
            let mut meta = ListMeta { revision: page.revision, ..ListMeta::default() };
            let total = page.items.len();
            for (index, pair) in page.items.iter().enumerate() {
                let Some(object) = self.decode_selected(pair, selection) else { continue };
                if options.limit > 0 && objects.len() == options.limit {
                    let remaining = total - index + page.remaining;
                    meta.remaining = selection.is_all().then_some(remaining);
                    let last = objects.last().map_or("", |last| &last.key);
                    meta.token = ContinueToken::new(at, last).encode();
                    return Ok((objects, meta));
                }
                objects.push(object);
            }
            if page.remaining == 0 {
                return Ok((objects, meta));
            }
            after = page.items.last().map(|pair| pair.key.clone());
        }
    }

    fn decode_selected(&self, pair: &control_store::KeyValue, selection: &Selection) -> Option<Arc<Object>> {
        let (_, object) = self.cache.decode(pair)?;
        selection.matches(&object).then(|| Arc::new(object))
    }
}

/// The error of a list whose state is gone; a continued list gets a token to go on with in the newest state.
fn expired_list(error: &StoreError, info: &ResourceInfo, start: &str) -> ApiError {
    match error {
        StoreError::Compacted { .. } if !start.is_empty() => {
            let mut expired = ApiError::expired(
                "The provided continue parameter is too old to display a consistent list result. You can start a new \
                 list without the continue parameter, or use the continue token in this response to retrieve the \
                 remainder of the results. Continuing with the provided token results in an inconsistent list - objects \
                 that were created, modified, or deleted between the time the first chunk was returned and now may show \
                 up in the list.",
            );
            expired.continue_token = ContinueToken::new(None, start).encode();
            expired
        }
        StoreError::Compacted { .. } => ApiError::expired(format!(
            "The resourceVersion for the provided list of {} is too old.",
            info.plural
        )),
        StoreError::Future { asked, newest } => ApiError::resource_version_too_large(asked.0, newest.0),
        other => store_error(other),
    }
}

/// The answer to a store that does not work.
pub(crate) fn store_error(error: &StoreError) -> ApiError {
    let mut unavailable = ApiError::new(
        control_api::status::Reason::ServiceUnavailable,
        format!("the store is not available: {error}"),
    );
    unavailable.retry_after_seconds = 1;
    unavailable
}

/// The text of a list in pieces of about [`CHUNK`] bytes, made as they are asked for.
fn list_chunks(
    info: &'static ResourceInfo,
    head: &str,
    objects: Vec<Arc<Object>>,
    form: Form,
) -> impl Iterator<Item = Bytes> + Send + use<> {
    let mut pending = BytesMut::from(head);
    let mut rest = objects.into_iter();
    let mut first = true;
    let mut done = false;
    std::iter::from_fn(move || {
        while !done && pending.len() < CHUNK {
            let Some(object) = rest.next() else {
                pending.extend_from_slice(b"]}");
                done = true;
                break;
            };
            match render::item(info, &object, form) {
                Ok(item) => {
                    if !std::mem::replace(&mut first, false) {
                        pending.extend_from_slice(b",");
                    }
                    pending.extend_from_slice(&item);
                }
                Err(error) => tracing::error!(key = %object.key, %error, "an object cannot be listed"),
            }
        }
        (!pending.is_empty()).then(|| pending.split().freeze())
    })
}
