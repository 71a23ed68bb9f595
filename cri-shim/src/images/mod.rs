//! Images: the CRI ImageService on containerd's content, images, snapshots, diff and leases services.
//!
//! Input: references such as `nginx:1.17` and registries configured below a `certs.d` directory. Output: images in
//! containerd, unpacked. containerd's own resolver and CRI plugin are not used.
//!
//! In reading order: [`store`] (what there is, pull, remove; [`known`] keeps the last listing), [`pull`] (one pull, and its
//! [`progress`]), [`registry`] with [`auth`] and [`hosts`] (the network side), [`content`], [`unpack`] and [`records`] over
//! [`session`] (the containerd side), [`manifest`] and [`reference`] (pure), [`import`] over [`archive`] (files instead of a
//! registry), [`mount`] (image volumes), [`usage`] (disk figures), [`settings`] and [`service`] (gRPC).

pub mod archive;
pub mod auth;
pub mod content;
pub mod decode;
pub mod digest;
pub mod feed;
pub mod fetch_error;
pub mod hostclient;
pub mod hosts;
pub mod import;
pub mod known;
pub mod layers;
pub mod manifest;
pub mod mount;
pub mod progress;
pub mod pull;
pub mod records;
pub mod reference;
pub mod registry;
pub mod service;
pub mod session;
pub mod settings;
pub mod store;
pub mod unpack;
pub mod untar;
pub mod usage;

pub use self::service::Service;
pub use self::settings::{Places, Settings};
pub use self::store::{Image, ImageError, ImageStore};
