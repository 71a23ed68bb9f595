//! Container Device Interface: devices that vendors describe in files, by their qualified names.
//!
//! Input: the parsed files ([`file`]) in the order of their directories, and the names that CRI or an annotation gives.
//! Output: what the named devices change of a container ([`Edits`]), or an error that names the device and, where a file
//! could not be read, the file. Reading files and looking at device nodes is the caller's.
//! See the CDI specification, versions 0.3 to 1.1.

pub mod file;
mod registry;

pub use self::file::{ContainerEdits, DeviceNode, File};
pub use self::registry::{CdiError, Edits, Registry};

/// Annotations of a container whose values name devices begin with this.
const ANNOTATION_PREFIX: &str = "cdi.k8s.io/";

/// The devices a container asks for: those of CRI's own field, then those of annotations, each once.
pub fn wanted<'a>(
    names: impl Iterator<Item = &'a str>,
    annotations: impl Iterator<Item = (&'a str, &'a str)>,
) -> Vec<String> {
    let annotated = annotations
        .filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX))
        .flat_map(|(_, value)| value.split(','))
        .map(str::trim)
        .filter(|name| !name.is_empty());
    let mut all: Vec<String> = Vec::new();
    for name in names.chain(annotated) {
        if !all.iter().any(|known| known == name) {
            all.push(name.to_owned());
        }
    }
    all
}
