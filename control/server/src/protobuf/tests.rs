//! Bodies built by hand, as Go's marshaller writes them.

use super::*;

/// A length-delimited field.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2, u8::try_from(bytes.len()).unwrap()];
    out.extend_from_slice(bytes);
    out
}

fn varint(number: u8, value: u8) -> Vec<u8> {
    vec![number << 3, value]
}

fn body(api_version: &str, kind: &str, message: &[u8]) -> Vec<u8> {
    let type_meta = [field(1, api_version.as_bytes()), field(2, kind.as_bytes())].concat();
    [MAGIC, &field(1, &type_meta), &field(2, message), &field(3, b""), &field(4, b"")].concat()
}

#[test]
fn empty_fields_that_go_always_writes_are_left_out() {
    let metadata = [
        field(1, b"c1"),
        field(2, b""),
        field(3, b"default"),
        field(4, b""),
        field(5, b""),
        field(6, b""),
        varint(7, 0),
        field(8, b""),
        field(11, &[field(1, b"app"), field(2, b"web")].concat()),
    ]
    .concat();
    let data = [field(1, b"key"), field(2, b"value")].concat();
    let message = [field(1, &metadata), field(2, &data)].concat();
    assert_eq!(
        decode(&body("v1", "ConfigMap", &message)).unwrap(),
        json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "c1", "namespace": "default", "labels": {"app": "web"}},
            "data": {"key": "value"},
        })
    );
}

#[test]
fn pointers_embedded_structs_and_special_types() {
    let port = [field(3, &[]), varint(3 - 1, 0)].concat();
    drop(port);
    // Deployment.spec { replicas: 0 (pointer), template.spec.volumes[0] { name, emptyDir (embedded union) } }
    let volume = [field(1, b"v"), field(2, &field(2, &field(1, b"")))].concat();
    let template = field(2, &field(1, &volume));
    let spec = [varint(1, 0), field(3, &template), varint(5, 0)].concat();
    let decoded = decode(&body("apps/v1", "Deployment", &field(2, &spec))).unwrap();
    assert_eq!(
        decoded["spec"],
        json!({"replicas": 0, "template": {"spec": {"volumes": [{"name": "v", "emptyDir": {}}]}}})
    );
    // Secret.data is bytes; Service ports have an IntOrString.
    let secret = field(2, &[field(1, b"k"), field(2, b"v")].concat());
    assert_eq!(decode(&body("v1", "Secret", &secret)).unwrap()["data"], json!({"k": "dg=="}));
    let target = [varint(1, 0), varint(2, 80), field(3, b"")].concat();
    let ports = field(1, &[varint(3, 80), field(4, &target)].concat());
    let service = decode(&body("v1", "Service", &field(2, &ports))).unwrap();
    assert_eq!(service["spec"]["ports"], json!([{"port": 80, "targetPort": 80}]));
}

#[test]
fn damaged_bodies_are_errors() {
    assert_eq!(decode(b"{}").unwrap_err(), ProtobufError::NoMagic);
    let whole = body("v1", "ConfigMap", &field(1, &field(1, b"c1")));
    for end in 4..whole.len() {
        // Every cut is either an error or a shorter message, never a panic.
        decode(&whole[..end]).err();
    }
    let cut = body("v1", "ConfigMap", &[0x0a, 0x7f]);
    assert_eq!(decode(&cut).unwrap_err(), ProtobufError::Malformed);
    assert!(matches!(decode(&body("v1", "Nothing", b"")).unwrap_err(), ProtobufError::UnknownKind { .. }));
}
