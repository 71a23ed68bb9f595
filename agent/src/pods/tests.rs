//! The pod loop against a fake CRI.
