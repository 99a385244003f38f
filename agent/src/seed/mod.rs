//! The seed disk of a guest that boots from its own disk: what cloud-init's NoCloud data source looks for.
//!
//! A whole disk image, as distributions ship it, cannot be told a kernel argument that points at the metadata service, and
//! wants its data before its network is up. So it gets a read-only disk with the label `cidata`. The disk is made of the guest's
//! description alone: every host makes the same bytes, and nothing of it ever travels or is written to.

mod iso;

use std::{path::Path, sync::Arc, time::Duration};

use supercloud_api::link::GuestSpec;
use supercloud_storage::{
    backend::{DirStore, ObjectStore},
    key::DataKeys,
    transfer::{DiskFormat, ImportOptions, Imported, import_image},
};
use tokio_util::sync::CancellationToken;

use crate::jobs::{JobError, file_error};

/// cloud-init's `meta-data` (NoCloud; YAML, in which JSON strings are strings).
#[must_use]
pub fn meta_data(spec: &GuestSpec) -> String {
    format!("instance-id: {}\nlocal-hostname: {}\n", spec.guest, spec.name)
}

/// cloud-init's `network-config`, version 2: every port by its hardware address, by DHCP.
#[must_use]
pub fn network_config(spec: &GuestSpec) -> String {
    let mut text = String::from("version: 2\nethernets:\n");
    for (index, port) in spec.ports.iter().enumerate() {
        text.push_str(&format!(
            "  net{index}:\n    match:\n      macaddress: \"{}\"\n    dhcp4: true\n    dhcp6: false\n",
            port.mac
        ));
    }
    if spec.ports.is_empty() {
        text = String::from("version: 2\nethernets: {}\n");
    }
    text
}

/// cloud-init's `user-data`; without any, an empty configuration.
#[must_use]
pub fn user_data(spec: &GuestSpec) -> String {
    spec.user_data.clone().unwrap_or_else(|| "#cloud-config\n{}\n".to_owned())
}

/// The disk's bytes.
#[must_use]
pub fn image(spec: &GuestSpec) -> Vec<u8> {
    let (meta, network, user) = (meta_data(spec), network_config(spec), user_data(spec));
    iso::image(
        "cidata",
        &[
            iso::File { name: "meta-data", short: "METADATA", bytes: meta.as_bytes() },
            iso::File { name: "network-config", short: "NETWORK", bytes: network.as_bytes() },
            iso::File { name: "user-data", short: "USERDATA", bytes: user.as_bytes() },
        ],
    )
}

/// Brings the seed disk of a guest into a store.
///
/// # Errors
/// When disk or store fail.
pub async fn store(
    spec: &GuestSpec,
    keys: &Arc<DataKeys>,
    store: &DirStore,
    folder: &Path,
    cancel: &CancellationToken,
) -> Result<Imported, JobError> {
    let bytes = image(spec);
    let path = folder.join("seed.iso");
    let file = path.clone();
    tokio::task::spawn_blocking(move || {
        use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
        let mut file = std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(file)?;
        file.write_all(&bytes)
    })
    .await?
    .map_err(file_error("write", &path))?;
    let options = ImportOptions {
        format: Some(DiskFormat::Raw),
        work_folder: folder.to_owned(),
        convert_budget: Duration::from_secs(1),
    };
    let store: Arc<dyn ObjectStore> = Arc::new(store.clone());
    let imported = import_image(&path, &options, Arc::clone(keys), store, cancel, |_| {}).await;
    let _ = tokio::fs::remove_file(&path).await;
    imported.map_err(|source| JobError::Content { what: "a place for the seed disk", source: Box::new(source) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::machine::tests::spec;

    #[test]
    fn the_same_guest_has_the_same_seed_everywhere() {
        let mut spec = spec(supercloud_ids::GuestId::generate());
        assert_eq!(image(&spec), image(&spec.clone()));
        let before = image(&spec);
        spec.user_data = Some("#cloud-config\nhostname: other\n".into());
        assert_ne!(image(&spec), before);
        assert!(network_config(&spec).contains("02:00:00:00:00:01"));
        spec.ports.clear();
        assert!(network_config(&spec).ends_with("{}\n"));
    }
}
