//! containerd's image records: a name that points at a manifest in the content store.

use containerd_client::services::v1::{
    CreateImageRequest, DeleteImageRequest, GetImageRequest, Image, ListImagesRequest, UpdateImageRequest,
};

use super::error::gone;
use super::{Containerd, ContainerdError, METADATA_DEADLINE, call};

impl Containerd {
    /// The image record called `name`, when there is one.
    pub async fn image(&self, name: &str) -> Result<Option<Image>, ContainerdError> {
        let request = GetImageRequest { name: name.to_owned() };
        match call("Images.Get", name, METADATA_DEADLINE, self.images_client().get(request)).await {
            Ok(answer) => Ok(answer.image),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every image record that matches one of `filters` (all, when there is none).
    pub async fn images(&self, filters: Vec<String>) -> Result<Vec<Image>, ContainerdError> {
        let request = ListImagesRequest { filters };
        let answer = call("Images.List", "", METADATA_DEADLINE, self.images_client().list(request)).await?;
        Ok(answer.images)
    }

    /// Creates the record, or points an existing one at the new target and labels.
    pub async fn put_image(&self, image: Image) -> Result<(), ContainerdError> {
        let name = image.name.clone();
        let create = CreateImageRequest { image: Some(image.clone()), ..CreateImageRequest::default() };
        match call("Images.Create", &name, METADATA_DEADLINE, self.images_client().create(create)).await {
            Err(error) if error.is_already_exists() => {
                let update = UpdateImageRequest { image: Some(image), ..UpdateImageRequest::default() };
                call("Images.Update", &name, METADATA_DEADLINE, self.images_client().update(update)).await?;
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Deletes the record `name`; one that is gone is fine. `sync` waits for the garbage collection it causes.
    pub async fn delete_image(&self, name: &str, sync: bool) -> Result<(), ContainerdError> {
        let request = DeleteImageRequest { name: name.to_owned(), sync, ..DeleteImageRequest::default() };
        gone(call("Images.Delete", name, super::TASK_DEADLINE, self.images_client().delete(request)).await)
    }
}
