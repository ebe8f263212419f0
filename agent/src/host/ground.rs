//! The ground under a path or a device: where bytes that are written there come to rest. Through
//! partitions, loop devices, md, LVM and the rest of the device mapper, down to whole disks, or to
//! what keeps them from a disk: memory and dm-crypt. Whether a disk is encrypted by EC2 is not known
//! here.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::block::{self, DevNum, Disk};
use super::mounts;

/// What is at the bottom of one branch of the stack of devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// Memory: tmpfs, or zram that writes nothing back.
    Memory(String),
    /// An encrypting target of the device mapper, by its name: nothing below it is plain.
    Crypt(String),
    /// A whole disk.
    Disk(Disk),
}

impl Layer {
    /// Whether what is written here reaches no disk in plain form, whatever the disks are.
    #[must_use]
    pub fn hides(&self) -> bool {
        !matches!(self, Self::Disk(_))
    }
}

impl fmt::Display for Layer {
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

/// How many devices may be stacked before it counts as a loop.
const DEPTH: usize = 16;

/// What a path rests on: the device itself for a device file, else the filesystem that the path is
/// on. None if there is nothing at the path. Never an empty list.
pub fn of_path(path: &Path) -> Result<Option<Vec<Layer>>> {
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
        Some(name @ ("tmpfs" | "ramfs")) => Ok(Some(vec![Layer::Memory(name.to_owned())])),
        Some(name) => bail!("{} is on {name}, whose disks are not known", path.display()),
        None => bail!("{} is on the unknown device {device}", path.display()),
    }
}

/// What a block device rests on. Never an empty list.
pub fn of_device(number: DevNum) -> Result<Vec<Layer>> {
    let mut layers = Vec::new();
    walk(&sysfs(number), &block::disk_by_number, DEPTH, &mut layers)?;
    ensure!(!layers.is_empty(), "nothing is known beneath the device {number}");
    layers.dedup();
    Ok(layers)
}

fn sysfs(number: DevNum) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{number}"))
}

type FindDisk<'a> = dyn Fn(DevNum) -> Result<Option<Disk>> + 'a;

/// Goes down from the device whose directory in sysfs is `dir`.
fn walk(dir: &Path, disk: &FindDisk<'_>, depth: usize, found: &mut Vec<Layer>) -> Result<()> {
    let doing = || format!("looking at {}", dir.display());
    let dir = fs::canonicalize(dir).with_context(doing)?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some(depth) = depth.checked_sub(1) else { bail!("too many devices beneath {name}") };
    if dir.join("partition").exists() {
        let whole = dir.parent().with_context(doing)?;
        return walk(whole, disk, depth, found);
    }
    if name.starts_with("zram") {
        // The attribute is there only in kernels that can write back.
        return match attribute(&dir.join("backing_dev"))?.as_deref() {
            None | Some("" | "none") => {
                found.push(Layer::Memory(name));
                Ok(())
            }
            Some(backing) => beneath(Path::new(backing), disk, depth, found),
        };
    }
    if let Some(uuid) = attribute(&dir.join("dm/uuid"))?
        && encrypts(&uuid)
    {
        found.push(Layer::Crypt(attribute(&dir.join("dm/name"))?.unwrap_or(name)));
        return Ok(());
    }
    if let Some(backing) = attribute(&dir.join("loop/backing_file"))? {
        return beneath(Path::new(&backing), disk, depth, found);
    }
    let mut slaves = match fs::read_dir(dir.join("slaves")) {
        Ok(entries) => {
            entries.map(|e| Ok(e?.path())).collect::<Result<Vec<_>>>().with_context(doing)?
        }
        Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e).with_context(doing),
    };
    slaves.sort();
    if !slaves.is_empty() {
        return slaves.iter().try_for_each(|slave| walk(slave, disk, depth, found));
    }
    let number = attribute(&dir.join("dev"))?.as_deref().and_then(DevNum::parse);
    let number = number.with_context(|| format!("reading the device number of {name}"))?;
    match disk(number)? {
        Some(disk) => found.push(Layer::Disk(disk)),
        // Empty targets, network block devices and the like: nobody knows what is there.
        None => bail!("{name} is no disk that is known, and stands on none"),
    }
    Ok(())
}

/// Goes down from a file or device that another device stands on.
fn beneath(path: &Path, disk: &FindDisk<'_>, depth: usize, found: &mut Vec<Layer>) -> Result<()> {
    let meta = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    let number = if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() };
    walk(&sysfs(DevNum::of(number)), disk, depth, found)
}

/// Whether a device mapper target with this UUID encrypts. cryptsetup gives its UUIDs the prefix
/// `CRYPT-`, to integrity and verity targets too, which hide nothing.
fn encrypts(uuid: &str) -> bool {
    ["CRYPT-LUKS1-", "CRYPT-LUKS2-", "CRYPT-PLAIN-"].iter().any(|kind| uuid.starts_with(kind))
}

fn attribute(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A made-up sysfs: directories with attributes, and links between them.
    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn device(&self, name: &str, attributes: &[(&str, &str)], slaves: &[&str]) -> &Self {
            let dir = self.0.path().join(name);
            fs::create_dir_all(dir.join("slaves")).unwrap();
            for (attribute, value) in attributes {
                let path = dir.join(attribute);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, value).unwrap();
            }
            for slave in slaves {
                let target = self.0.path().join(slave);
                let link = dir.join("slaves").join(target.file_name().unwrap());
                std::os::unix::fs::symlink(target, link).unwrap();
            }
            self
        }

        fn walk(&self, name: &str) -> Result<Vec<String>> {
            let disk = |number: DevNum| {
                let disk = |name: &str| Disk {
                    name: name.to_owned(),
                    number,
                    serial: None,
                    model: None,
                    size: 1,
                };
                Ok((number.major == 259).then(|| disk(&format!("disk{}", number.minor))))
            };
            let mut found = Vec::new();
            walk(&self.0.path().join(name), &disk, DEPTH, &mut found)?;
            Ok(found.iter().map(ToString::to_string).collect())
        }
    }

    #[test]
    fn stacks_are_followed_to_every_disk() {
        let sys = Sysfs::new();
        sys.device("nvme0n1", &[("dev", "259:0\n")], &[])
            .device("nvme0n1/nvme0n1p1", &[("dev", "259:5"), ("partition", "1")], &[])
            .device("nvme1n1", &[("dev", "259:1")], &[])
            .device("md0", &[("dev", "9:0")], &["nvme0n1/nvme0n1p1", "nvme1n1"])
            .device(
                "dm-0",
                &[("dev", "253:0"), ("dm/uuid", "LVM-abc"), ("dm/name", "v-r")],
                &["md0"],
            );
        assert_eq!(sys.walk("nvme0n1/nvme0n1p1").unwrap(), ["the disk disk0"]);
        assert_eq!(sys.walk("dm-0").unwrap(), ["the disk disk0", "the disk disk1"]);
    }

    #[test]
    fn only_what_encrypts_hides() {
        let sys = Sysfs::new();
        sys.device("nvme0n1", &[("dev", "259:0")], &[])
            .device("dm-1", &[("dm/uuid", "CRYPT-LUKS2-ab-x"), ("dm/name", "x")], &["nvme0n1"])
            .device("dm-2", &[("dm/uuid", "CRYPT-VERITY-ab-y"), ("dm/name", "y")], &["nvme0n1"])
            .device("dm-3", &[("dm/uuid", "LVM-z"), ("dm/name", "z")], &["dm-1", "nvme0n1"]);
        assert_eq!(sys.walk("dm-1").unwrap(), ["x (dm-crypt)"]);
        assert_eq!(sys.walk("dm-2").unwrap(), ["the disk disk0"]);
        assert_eq!(sys.walk("dm-3").unwrap(), ["x (dm-crypt)", "the disk disk0"]);
    }

    #[test]
    fn zram_is_memory_only_without_a_backing_device() {
        let sys = Sysfs::new();
        sys.device("zram0", &[("dev", "252:0"), ("backing_dev", "none\n")], &[])
            .device("zram1", &[("dev", "252:1")], &[])
            .device("zram2", &[("dev", "252:2"), ("backing_dev", "/no/such/device\n")], &[]);
        assert_eq!(sys.walk("zram0").unwrap(), ["zram0 (memory)"]);
        assert_eq!(sys.walk("zram1").unwrap(), ["zram1 (memory)"]);
        assert!(sys.walk("zram2").is_err());
    }

    #[test]
    fn what_cannot_be_followed_is_an_error() {
        let sys = Sysfs::new();
        sys.device("nbd0", &[("dev", "43:0")], &[])
            .device("dm-0", &[("dev", "253:0"), ("dm/uuid", ""), ("dm/name", "zero")], &[])
            .device("dm-1", &[("dev", "253:1")], &["dm-1"])
            .device("none", &[], &[]);
        for name in ["nbd0", "dm-0", "dm-1", "none", "absent"] {
            assert!(sys.walk(name).is_err(), "{name}");
        }
    }

    #[test]
    fn memory_and_absence_are_told() {
        assert_eq!(of_path(Path::new("/no/such/path")).unwrap(), None);
        assert!(of_path(Path::new("/proc/self/stat")).is_err(), "procfs is neither disk nor tmpfs");
    }
}
