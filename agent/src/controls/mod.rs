//! The controls, one file each. A control observes through [`crate::host`] and [`crate::aws`]; it
//! opens no file and starts no program by itself. Their order is [`crate::control::REGISTRY`].

pub mod boot_order;
pub mod core_dumps;
pub mod data_filesystem;
pub mod data_mount;
pub mod data_volume;
pub mod docker_storage;
pub mod instance_tenancy;
pub mod root_volume;
pub mod sshd_port;
pub mod swap;

use std::path::{Path, PathBuf};

/// Where hostagent writes a unit's file.
fn unit_path(unit: &str) -> PathBuf {
    Path::new(crate::step::UNITS).join(unit)
}
