//! From a resource request to its handler, and from the outcome to a response.

use bytes::Bytes;
use control_api::{
    convert,
    kinds::ResourceInfo,
    meta,
    status::{self, ApiError, Reason},
};
use http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use hyper::body::Incoming;

use super::{
    Api,
    delete::Deleted,
    options::{self, ListOptions, Selection, WriteOptions},
    patch::Patch,
    render,
    write::{ObjectRef, Part, Updated, Write, decode_any, decode_object},
};
use crate::{
    auth::User,
    cache::Object,
    http::{
        body::{self, Reply},
        negotiate::{self, Form},
        query::Query,
        target::ResourceTarget,
    },
    subresource,
};

/// A request for a resource, authorized.
pub(crate) struct ResourceRequest {
    /// What it is about.
    pub target: ResourceTarget,
    /// Its parameters.
    pub query: Query,
    /// Who asks.
    pub user: User,
    /// The HTTP request.
    pub http: Request<Incoming>,
}

impl ResourceRequest {
    /// The object that the request names.
    pub(crate) fn object(&self) -> Result<ObjectRef<'_>, ApiError> {
        let ResourceTarget { info, namespace, name, .. } = &self.target;
        let name = name.as_deref().ok_or_else(|| ApiError::method_not_allowed(info, self.target.verb))?;
        Ok(ObjectRef { info, namespace: namespace.as_deref(), name })
    }

    /// Headers of the request.
    pub(crate) fn headers(&self) -> &HeaderMap {
        self.http.headers()
    }
}

impl Api {
    /// Answer a request for a resource.
    pub(crate) async fn serve_resource(&self, request: ResourceRequest) -> Result<Reply, ApiError> {
        let ResourceTarget { info, verb, .. } = request.target;
        if request.target.subresource.is_some() {
            return subresource::serve(self, request).await;
        }
        if !info.allows(verb) {
            return Err(ApiError::method_not_allowed(info, verb));
        }
        if !info.is_stored() {
            return subresource::serve_create_only(self, request).await;
        }
        let form = negotiate::accept(request.headers(), &request.query)?;
        match verb {
            "get" => self.serve_get(&request, form).await,
            "list" => {
                let options = ListOptions::parse(info, request.target.namespace.as_deref(), &request.query)?;
                self.list(info, &options, form).await
            }
            "watch" => {
                let (namespace, name) = (request.target.namespace.as_deref(), request.target.name.as_deref());
                self.watch(info, namespace, name, &request.query, form).await
            }
            "create" => self.serve_create(request, form).await,
            "update" => self.serve_update(request, form).await,
            "patch" => self.serve_patch(request, form).await,
            "delete" => self.serve_delete(request, form).await,
            "deletecollection" => self.serve_delete_collection(request).await,
            _ => Err(ApiError::method_not_allowed(info, verb)),
        }
    }

    async fn serve_get(&self, request: &ResourceRequest, form: Form) -> Result<Reply, ApiError> {
        let ObjectRef { info, namespace, name } = request.object()?;
        let freshness = options::freshness(info, &request.query)?;
        let object = self.get_object(info, namespace, name, freshness).await?;
        Ok(body::json_bytes(StatusCode::OK, render::one(info, &object, form)?))
    }

    async fn serve_create(&self, request: ResourceRequest, form: Form) -> Result<Reply, ApiError> {
        let ResourceRequest { target, query, user, http } = request;
        let info = target.info;
        if target.name.is_some() || (info.namespaced && target.namespace.is_none()) {
            return Err(ApiError::method_not_allowed(info, target.verb));
        }
        let mut write = Write::new(&user, WriteOptions::parse(&query, http.headers())?);
        let format = negotiate::body_format(http.headers())?;
        let bytes = body::read(http.into_body()).await?;
        let object = decode_object(info, &bytes, format, &mut write)?;
        let created = self.create(info, target.namespace.as_deref(), object, &mut write).await?;
        object_reply(StatusCode::CREATED, info, &created, form, &write.warnings)
    }

    async fn serve_update(&self, request: ResourceRequest, form: Form) -> Result<Reply, ApiError> {
        let ResourceRequest { target, query, user, http } = request;
        let info = target.info;
        let (namespace, name) = (target.namespace.as_deref(), target.name.as_deref().unwrap_or_default());
        let mut write = Write::new(&user, WriteOptions::parse(&query, http.headers())?);
        let format = negotiate::body_format(http.headers())?;
        let bytes = body::read(http.into_body()).await?;
        let object = decode_object(info, &bytes, format, &mut write)?;
        let named = ObjectRef { info, namespace, name };
        let updated = self.update(named, Part::MAIN, &mut write, |_, _| Ok(object.clone())).await;
        match updated {
            Err(error) if error.reason == Reason::NotFound && info.create_on_update => {
                let mut object = object;
                if meta::name(&object).is_empty() {
                    object["metadata"]["name"] = name.into();
                }
                let created = self.create(info, namespace, object, &mut write).await?;
                object_reply(StatusCode::CREATED, info, &created, form, &write.warnings)
            }
            other => object_reply(StatusCode::OK, info, &other?.object(), form, &write.warnings),
        }
    }

    async fn serve_patch(&self, request: ResourceRequest, form: Form) -> Result<Reply, ApiError> {
        let part = Part::MAIN;
        let (info, updated, warnings) = self.patch_object(request, part).await?;
        let status =
            if matches!(updated, Updated::Created(_)) { StatusCode::CREATED } else { StatusCode::OK };
        object_reply(status, info, &updated.object(), form, &warnings)
    }

    /// Patch the object or the part of it that a subresource shows whole (`status`).
    pub(crate) async fn patch_object(
        &self,
        request: ResourceRequest,
        part: Part,
    ) -> Result<(&'static ResourceInfo, Updated, Vec<String>), ApiError> {
        let ResourceRequest { target, query, user, http } = request;
        let info = target.info;
        let mut write = Write::new(&user, WriteOptions::parse(&query, http.headers())?);
        let media_type = negotiate::content_type(http.headers()).to_owned();
        let bytes = body::read(http.into_body()).await?;
        let patch = Patch::decode(&media_type, &bytes)?;
        let (namespace, name) = (target.namespace.as_deref(), target.name.as_deref().unwrap_or_default());
        let named = ObjectRef { info, namespace, name };
        write.keeps_owners = patch.is_apply();
        target.sub().clone_into(&mut write.subresource);
        let change = |old: &serde_json::Value, write: &mut Write<'_>| {
            let shown = convert::from_stored(info, old.clone());
            Ok(convert::to_stored(info, patch.apply(info, &shown, write)?))
        };
        match self.update(named, part, &mut write, change).await {
            Err(error) if error.reason == Reason::NotFound && patch.is_apply() && part == Part::MAIN => {
                let mut object = patch.apply_declared(info, None, &mut write)?;
                object["metadata"]["name"] = name.into();
                let created =
                    self.create(info, namespace, convert::to_stored(info, object), &mut write).await?;
                Ok((info, Updated::Created(created), write.warnings))
            }
            updated => Ok((info, updated?, write.warnings)),
        }
    }

    async fn serve_delete(&self, request: ResourceRequest, form: Form) -> Result<Reply, ApiError> {
        let ResourceRequest { target, query, user, http } = request;
        let info = target.info;
        let options = read_delete_options(http, &query).await?;
        let (namespace, name) = (target.namespace.as_deref(), target.name.as_deref().unwrap_or_default());
        match self.delete(ObjectRef { info, namespace, name }, &user, &options).await? {
            Deleted::Gone(object) if !info.graceful_delete => {
                let value = object.value().map_err(ApiError::internal)?;
                let done = status::success(info, name, meta::uid(&value));
                Ok(body::json(StatusCode::OK, &done))
            }
            Deleted::Gone(object) | Deleted::Waits(object) => {
                object_reply(StatusCode::OK, info, &object, form, &[])
            }
        }
    }

    async fn serve_delete_collection(&self, request: ResourceRequest) -> Result<Reply, ApiError> {
        let ResourceRequest { target, query, user, http } = request;
        let info = target.info;
        let options = read_delete_options(http, &query).await?;
        let selection = Selection::parse(info, target.namespace.as_deref(), None, &query)?;
        let named = ObjectRef { info, namespace: target.namespace.as_deref(), name: "" };
        let deleted = self.delete_collection(named, &selection, &user, &options).await?;
        let meta = render::ListMeta { revision: self.cache.revision(), ..render::ListMeta::default() };
        let mut list = render::list_head(info, &meta, Form::Object);
        for (index, object) in deleted.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            list.push_str(comma);
            list.push_str(&String::from_utf8_lossy(&render::item(info, object, Form::Object)?));
        }
        list.push_str("]}");
        Ok(body::json_bytes(StatusCode::OK, list))
    }
}

async fn read_delete_options(
    http: Request<Incoming>,
    query: &Query,
) -> Result<meta::DeleteOptions, ApiError> {
    let format = negotiate::body_format(http.headers())?;
    let bytes: Bytes = body::read(http.into_body()).await?;
    let document = if bytes.is_empty() { serde_json::json!({}) } else { decode_any(&bytes, format)?.0 };
    options::delete_options(&document, query)
}

/// An object as the answer to a write.
pub(crate) fn object_reply(
    status: StatusCode,
    info: &ResourceInfo,
    object: &Object,
    form: Form,
    warnings: &[String],
) -> Result<Reply, ApiError> {
    let mut reply = body::json_bytes(status, render::one(info, object, form)?);
    for warning in warnings {
        let quoted = warning.replace('\\', "\\\\").replace('"', "\\\"");
        // A text that is no header value cannot be shown; the write stands all the same.
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            reply.headers_mut().append(header::WARNING, value);
        }
    }
    Ok(reply)
}
