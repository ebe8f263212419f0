//! The controls, one file each. A control observes through [`crate::host`] and [`crate::aws`]; it
//! opens no file and starts no program by itself. Their order is [`crate::control::REGISTRY`].

pub mod boot_order;
pub mod container_storage;
pub mod core_dumps;
pub mod data_filesystem;
pub mod data_mount;
pub mod data_size;
pub mod data_volume;
pub mod docker_daemon;
pub mod docker_storage;
pub mod instance_tenancy;
pub mod root_volume;
pub mod sshd_hardening;
pub mod sshd_port;
pub mod swap;

use std::path::{Path, PathBuf};

use crate::host::systemd::BARRED;
use crate::step::Step;

/// Where hostagent writes a unit's file.
fn unit_path(unit: &str) -> PathBuf {
    Path::new("/etc/systemd/system").join(unit)
}

/// The step that keeps systemd from starting a unit, whose file may be anybody's. Not a mask: that
/// needs the place of the unit's file, and fails what requires the unit (all of `swap.target`).
fn bar(unit: &str, control: &str) -> Step {
    Step::WriteFile {
        path: unit_path(&format!("{unit}.d")).join("10-hostagent.conf"),
        content: format!(
            "# Written by hostagent (control {control}). Changes are overwritten.\n\
             [Unit]\n\
             # Never met: this is not to be started on a host that holds patient data.\n\
             {BARRED}\n"
        ),
        mode: 0o644,
    }
}
