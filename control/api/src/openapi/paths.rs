//! Paths and operations in OpenAPI v2's form; the other forms are made from it.

use serde_json::{Map, Value, json};

use crate::kinds::{ResourceInfo, Subresource};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";
const JSON: &str = "application/json";
const PATCHES: &[&str] = &[
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

/// `(name, type, description)` of query parameters.
type Parameter = (&'static str, &'static str, &'static str);

const READ_LIST: &[Parameter] = &[
    ("allowWatchBookmarks", "boolean", "Asks for watch events of type BOOKMARK."),
    ("continue", "string", "Token of an earlier list, to go on from there."),
    ("fieldSelector", "string", "Restricts the objects by their fields."),
    ("labelSelector", "string", "Restricts the objects by their labels."),
    ("limit", "integer", "The most objects of one answer."),
    ("resourceVersion", "string", "How recent the answer must be, or where a watch starts."),
    ("resourceVersionMatch", "string", "How resourceVersion is meant: Exact or NotOlderThan."),
    ("sendInitialEvents", "boolean", "A watch first sends what there is."),
    ("timeoutSeconds", "integer", "How long a list or watch may take."),
    ("watch", "boolean", "Watches instead of listing."),
];
const WRITE: &[Parameter] = &[
    ("dryRun", "string", "All: everything is checked and nothing stored."),
    ("fieldManager", "string", "Who makes the change."),
    ("fieldValidation", "string", "Ignore, Warn or Strict: what to do about unknown and repeated fields."),
];
const FORCE: &[Parameter] = &[("force", "boolean", "Server-side apply takes over fields of other managers.")];
const DELETE: &[Parameter] = &[
    ("dryRun", "string", "All: everything is checked and nothing stored."),
    ("gracePeriodSeconds", "integer", "How long the object may take to end, 0 for at once."),
    ("orphanDependents", "boolean", "Superseded by propagationPolicy."),
    ("propagationPolicy", "string", "Orphan, Background or Foreground: what happens to dependents."),
];
const EXEC: &[Parameter] = &[
    ("command", "string", "Command and arguments, one parameter each."),
    ("container", "string", "Which container."),
    ("stderr", "boolean", "Whether to stream standard error."),
    ("stdin", "boolean", "Whether to stream standard input."),
    ("stdout", "boolean", "Whether to stream standard output."),
    ("tty", "boolean", "Whether to use a terminal."),
];
const LOG: &[Parameter] = &[
    ("container", "string", "Which container."),
    ("follow", "boolean", "Goes on as lines are written."),
    ("insecureSkipTLSVerifyBackend", "boolean", "Does not verify the kubelet's certificate."),
    ("limitBytes", "integer", "The most bytes."),
    ("previous", "boolean", "The container before the last restart."),
    ("sinceSeconds", "integer", "Lines no older than this."),
    ("tailLines", "integer", "The last lines only."),
    ("timestamps", "boolean", "Every line with its time."),
];
const PROXY: &[Parameter] = &[("path", "string", "The path at the kubelet.")];
const PORTS: &[Parameter] = &[("ports", "integer", "Ports to forward.")];

/// The paths of one group and version.
pub(super) fn of_group(rows: &[&ResourceInfo]) -> Map<String, Value> {
    let mut paths = Map::new();
    for info in rows {
        let root = root(info);
        let scoped = if info.namespaced { format!("{root}/namespaces/{{namespace}}") } else { root.clone() };
        let collection = format!("{scoped}/{}", info.plural);
        paths.insert(collection.clone(), collection_item(info, info.namespaced));
        if info.namespaced && info.allows("list") {
            let mut item = json!({ "parameters": common(&[]) });
            item["get"] = list(info, "ForAllNamespaces");
            paths.insert(format!("{root}/{}", info.plural), item);
        }
        if info.allows("get") {
            paths.insert(format!("{collection}/{{name}}"), object_item(info));
        }
        for sub in info.subresources {
            paths.insert(format!("{collection}/{{name}}/{}", sub.name), subresource_item(info, sub));
        }
    }
    paths
}

fn root(info: &ResourceInfo) -> String {
    format!("/{}", super::group_path(info.group, info.version))
}

fn collection_item(info: &ResourceInfo, namespaced: bool) -> Value {
    let mut item = json!({ "parameters": common(if namespaced { &["namespace"] } else { &[] }) });
    if info.allows("list") {
        item["get"] = list(info, "");
    }
    if info.allows("create") {
        let mut post = operation(info, "create", "post", "", WRITE);
        with_body(&mut post, info.definition);
        answers(&mut post, &["200", "201", "202"], info.definition);
        item["post"] = post;
    }
    if info.allows("deletecollection") {
        let all: Vec<Parameter> = READ_LIST.iter().chain(DELETE).copied().collect();
        let mut delete = operation(info, "deleteCollection", "deletecollection", "", &all);
        with_body(&mut delete, &format!("{META}.DeleteOptions"));
        answers(&mut delete, &["200"], &format!("{META}.Status"));
        item["delete"] = delete;
    }
    item
}

fn list(info: &ResourceInfo, suffix: &str) -> Value {
    let mut get = operation(info, "list", "list", suffix, READ_LIST);
    answers(&mut get, &["200"], &format!("{}List", info.definition));
    get
}

fn object_item(info: &ResourceInfo) -> Value {
    let mut item = json!({ "parameters": common(object_parameters(info)) });
    let mut get = operation(info, "read", "get", "", &[]);
    answers(&mut get, &["200"], info.definition);
    item["get"] = get;
    if info.allows("update") {
        item["put"] = put(info, info.definition, "");
    }
    if info.allows("patch") {
        item["patch"] = patch(info, info.definition, "");
    }
    if info.allows("delete") {
        let mut delete = operation(info, "delete", "delete", "", DELETE);
        with_body(&mut delete, &format!("{META}.DeleteOptions"));
        answers(&mut delete, &["200", "202"], &format!("{META}.Status"));
        item["delete"] = delete;
    }
    item
}

fn object_parameters(info: &ResourceInfo) -> &'static [&'static str] {
    if info.namespaced { &["name", "namespace"] } else { &["name"] }
}

fn put(info: &ResourceInfo, definition: &str, suffix: &str) -> Value {
    let mut put = operation(info, "replace", "put", suffix, WRITE);
    with_body(&mut put, definition);
    answers(&mut put, &["200", "201"], definition);
    put
}

fn patch(info: &ResourceInfo, definition: &str, suffix: &str) -> Value {
    let all: Vec<Parameter> = WRITE.iter().chain(FORCE).copied().collect();
    let mut patch = operation(info, "patch", "patch", suffix, &all);
    with_body(&mut patch, &format!("{META}.Patch"));
    patch["consumes"] = json!(PATCHES);
    answers(&mut patch, &["200", "201"], definition);
    patch
}

fn subresource_item(info: &ResourceInfo, sub: &Subresource) -> Value {
    let mut item = json!({ "parameters": common(object_parameters(info)) });
    let suffix = camel(sub.name);
    let streams: Option<&[Parameter]> = match sub.name {
        "exec" | "attach" => Some(EXEC),
        "portforward" => Some(PORTS),
        "proxy" => Some(PROXY),
        _ => None,
    };
    if let Some(parameters) = streams {
        let methods: &[&str] = match sub.name {
            "proxy" => &["get", "post", "put", "patch", "delete"],
            _ => &["get", "post"],
        };
        for method in methods {
            let verb = format!("connect{}", camel(method));
            let mut connect = operation(info, &verb, "connect", &suffix, parameters);
            connect["responses"]["200"] = json!({ "description": "OK", "schema": { "type": "string" } });
            item[*method] = kind_of(connect, info, sub);
        }
        return item;
    }
    if sub.name == "log" {
        let mut get = operation(info, "read", "get", &suffix, LOG);
        get["responses"]["200"] = json!({ "description": "OK", "schema": { "type": "string" } });
        item["get"] = get;
        return item;
    }
    let definition = definition_of(info, sub);
    for verb in sub.verbs {
        let (method, built) = match *verb {
            "get" => {
                let mut get = operation(info, "read", "get", &suffix, &[]);
                answers(&mut get, &["200"], &definition);
                ("get", get)
            }
            "update" => ("put", put(info, &definition, &suffix)),
            "patch" => ("patch", patch(info, &definition, &suffix)),
            "create" => {
                let mut post = operation(info, "create", "post", &suffix, WRITE);
                with_body(&mut post, &definition);
                answers(&mut post, &["200", "201", "202"], &definition);
                ("post", post)
            }
            _ => continue,
        };
        item[method] = kind_of(built, info, sub);
    }
    item
}

/// The OpenAPI definition of a subresource's body.
pub(super) fn definition_of(info: &ResourceInfo, sub: &Subresource) -> String {
    match sub.group_version {
        None if sub.kind == info.kind => info.definition.to_owned(),
        group_version => {
            let (group, version) = group_version.unwrap_or((info.group, info.version));
            let package = match group.split('.').next() {
                None | Some("") => "core",
                Some(package) => package,
            };
            format!("io.k8s.api.{package}.{version}.{}", sub.kind)
        }
    }
}

/// The subresource's own kind, where it has one.
fn kind_of(mut operation: Value, info: &ResourceInfo, sub: &Subresource) -> Value {
    let (group, version) = sub.group_version.unwrap_or((info.group, info.version));
    operation["x-kubernetes-group-version-kind"] =
        json!({ "group": group, "version": version, "kind": sub.kind });
    operation
}

fn operation(info: &ResourceInfo, verb: &str, action: &str, suffix: &str, query: &[Parameter]) -> Value {
    let group = match info.group.split('.').next() {
        None | Some("") => "core",
        Some(group) => group,
    };
    let (tag, version, kind) = (format!("{group}_{}", info.version), camel(info.version), info.kind);
    let scope = if info.namespaced && suffix != "ForAllNamespaces" { "Namespaced" } else { "" };
    let parameters: Vec<Value> = query
        .iter()
        .map(|(name, kind, description)| {
            json!({ "name": name, "in": "query", "type": kind, "uniqueItems": true, "description": description })
        })
        .collect();
    json!({
        "description": format!("{verb} {kind}"),
        "tags": [tag],
        "operationId": format!("{verb}{}{version}{scope}{kind}{suffix}", camel(group)),
        "consumes": ["*/*"],
        "produces": [JSON, "application/yaml"],
        "schemes": ["https"],
        "parameters": parameters,
        "responses": { "401": { "description": "Unauthorized" } },
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind":
            { "group": info.group, "version": info.version, "kind": info.kind },
    })
}

fn with_body(operation: &mut Value, definition: &str) {
    let body = json!({
        "name": "body", "in": "body", "required": true,
        "schema": { "$ref": format!("#/definitions/{definition}") },
    });
    if let Some(parameters) = operation["parameters"].as_array_mut() {
        parameters.insert(0, body);
    }
}

fn answers(operation: &mut Value, codes: &[&str], definition: &str) {
    for code in codes {
        let description = match *code {
            "200" => "OK",
            "201" => "Created",
            _ => "Accepted",
        };
        operation["responses"][*code] = json!({ "description": description, "schema": { "$ref": format!("#/definitions/{definition}") } });
    }
}

/// The parameters that every operation of a path has.
fn common(in_path: &[&str]) -> Vec<Value> {
    let mut parameters: Vec<Value> = in_path
        .iter()
        .map(|name| {
            json!({ "name": name, "in": "path", "type": "string", "required": true, "uniqueItems": true,
                "description": format!("The object's {name}.") })
        })
        .collect();
    parameters.push(json!({
        "name": "pretty", "in": "query", "type": "string", "uniqueItems": true,
        "description": "If 'true', the answer is indented.",
    }));
    parameters
}

fn camel(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_ascii_uppercase().to_string() + chars.as_str())
}
