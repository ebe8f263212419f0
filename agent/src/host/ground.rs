//! The ground under a path or a device: where bytes that are written there come to rest. Through
//! partitions, loop devices, md, LVM and the rest of the device mapper, down to whole disks, or to
//! what keeps them from a disk: memory and dm-crypt. Whether a disk is encrypted by EC2 is not known
//! here.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::block::{DevNum, Disk};
use super::chain::{Kind, Layer};
use super::mounts;

/// What is at the bottom of one branch of the stack of devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ground {
    /// Memory: tmpfs, or zram that writes nothing back.
    Memory(String),
    /// An encrypting target of the device mapper, by its name: nothing below it is plain.
    Crypt(String),
    /// A whole disk.
    Disk(Disk),
}

impl Ground {
    /// Whether what is written here reaches no disk in plain form, whatever the disks are.
    #[must_use]
    pub fn hides(&self) -> bool {
        !matches!(self, Self::Disk(_))
    }
}

impl fmt::Display for Ground {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(name) => write!(f, "{name} (memory)"),
            Self::Crypt(name) => write!(f, "{name} (dm-crypt)"),
            Self::Disk(disk) => match disk.volume_id() {
                Some(id) => write!(f, "{id}"),
                None => write!(f, "the disk {}", disk.name),
            },
        }
    }
}

/// What a path rests on: the device itself for a device file, else the filesystem that the path is
/// on. None if there is nothing at the path. Never an empty list.
pub fn of_path(path: &Path) -> Result<Option<Vec<Ground>>> {
    let doing = || format!("looking at {}", path.display());
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(doing),
    };
    if meta.file_type().is_block_device() {
        return of_device(DevNum::of(meta.rdev())).map(Some);
    }
    let device = DevNum::of(meta.dev());
    if device.major != 0 {
        return of_device(device).map(Some);
    }
    // A filesystem without a device of its own: memory, the network, or one that spans several.
    let all = mounts::all()?;
    let mount = all.iter().rfind(|m| m.device == device);
    match mount.map(|m| m.fs_type.as_str()) {
        Some(name @ ("tmpfs" | "ramfs")) => Ok(Some(vec![Ground::Memory(name.to_owned())])),
        Some(name) => bail!("{} is on {name}, whose disks are not known", path.display()),
        None => bail!("{} is on the unknown device {device}", path.display()),
    }
}

/// What a block device rests on. Never an empty list.
pub fn of_device(number: DevNum) -> Result<Vec<Ground>> {
    of_layer(&Layer::of(number)?)
}

fn of_layer(layer: &Layer) -> Result<Vec<Ground>> {
    let mut found = Vec::new();
    walk(layer, &mut found)?;
    found.dedup();
    Ok(found)
}

fn walk(layer: &Layer, found: &mut Vec<Ground>) -> Result<()> {
    match &layer.kind {
        Kind::Disk(disk) => found.push(Ground::Disk(disk.clone())),
        Kind::Memory => found.push(Ground::Memory(layer.name.clone())),
        // Nothing below it is plain.
        Kind::Crypt(name) => found.push(Ground::Crypt(name.clone())),
        // Empty targets, network block devices and the like: nobody knows what is there.
        _ if layer.on.is_empty() => {
            bail!("{} is no disk that is known, and stands on none", layer.name)
        }
        _ => layer.on.iter().try_for_each(|beneath| walk(beneath, found))?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::chain::tests::Sys;

    fn ground(sys: &Sys, number: &str) -> Result<Vec<String>> {
        Ok(of_layer(&sys.layer(number)?)?.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn stacks_are_followed_to_every_disk() {
        let sys = Sys::new();
        sys.disk("nvme0n1", "259:0", "vol0aaaaaaaaaaaaaaa1");
        sys.device("nvme0n1/nvme0n1p1", "259:5", &[("partition", "1")]);
        sys.disk("nvme1n1", "259:1", "");
        sys.device("md0", "9:0", &[("md/level", "raid0")]);
        sys.slave("md0", "nvme0n1/nvme0n1p1");
        sys.slave("md0", "nvme1n1");
        sys.device("dm-0", "253:0", &[("dm/uuid", "LVM-abc"), ("dm/name", "v-r")]);
        sys.slave("dm-0", "md0");
        assert_eq!(ground(&sys, "259:5").unwrap(), ["vol-0aaaaaaaaaaaaaaa1"]);
        assert_eq!(ground(&sys, "253:0").unwrap(), ["the disk nvme1n1", "vol-0aaaaaaaaaaaaaaa1"]);
    }

    #[test]
    fn only_what_encrypts_hides() {
        let sys = Sys::new();
        sys.disk("nvme0n1", "259:0", "");
        for (name, number, uuid, below) in [
            ("dm-1", "253:1", "CRYPT-LUKS2-ab-x", &["nvme0n1"][..]),
            ("dm-2", "253:2", "CRYPT-VERITY-ab-y", &["nvme0n1"]),
            ("dm-3", "253:3", "LVM-z", &["dm-1", "nvme0n1"]),
        ] {
            sys.device(name, number, &[("dm/uuid", uuid), ("dm/name", "x")]);
            for lower in below {
                sys.slave(name, lower);
            }
        }
        assert_eq!(ground(&sys, "253:1").unwrap(), ["x (dm-crypt)"]);
        assert_eq!(ground(&sys, "253:2").unwrap(), ["the disk nvme0n1"]);
        assert_eq!(ground(&sys, "253:3").unwrap(), ["x (dm-crypt)", "the disk nvme0n1"]);
    }

    #[test]
    fn zram_is_memory_only_without_a_backing_device() {
        let sys = Sys::new();
        sys.device("zram0", "252:0", &[("backing_dev", "none\n")]);
        sys.device("zram1", "252:1", &[]);
        sys.device("zram2", "252:2", &[("backing_dev", "/no/such/device\n")]);
        assert_eq!(ground(&sys, "252:0").unwrap(), ["zram0 (memory)"]);
        assert_eq!(ground(&sys, "252:1").unwrap(), ["zram1 (memory)"]);
        assert!(ground(&sys, "252:2").is_err());
    }

    #[test]
    fn what_cannot_be_followed_is_an_error() {
        let sys = Sys::new();
        sys.device("nbd0", "43:0", &[]);
        sys.device("dm-0", "253:0", &[("dm/uuid", ""), ("dm/name", "zero")]);
        sys.device("dm-1", "253:1", &[("dm/uuid", "LVM-x")]);
        sys.slave("dm-1", "dm-1");
        for number in ["43:0", "253:0", "253:1", "1:1"] {
            assert!(ground(&sys, number).is_err(), "{number}");
        }
    }

    #[test]
    fn memory_and_absence_are_told() {
        assert_eq!(of_path(Path::new("/no/such/path")).unwrap(), None);
        assert!(of_path(Path::new("/proc/self/stat")).is_err(), "procfs is neither disk nor tmpfs");
    }
}
