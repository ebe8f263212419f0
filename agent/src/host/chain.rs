//! What a block device stands on: from a device number down through partitions, LVM, dm-crypt and
//! md to every disk, as the kernel tells it in sysfs. Which EBS volume a disk is, is
//! [`super::block`]'s business; what the volumes are worth is [`crate::volume`]'s.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::block::{self, DevNum, Disk, ToldBy, VolumeId};

/// A stack of devices has at most this many layers; more is a loop.
const DEEPEST: usize = 16;

/// A block device, and what it stands on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// The kernel's name at this moment.
    pub name: String,
    /// Its device number.
    pub number: DevNum,
    /// Its size in bytes.
    pub size: u64,
    /// What it is.
    pub kind: Kind,
    /// The devices that it stands on; none beneath a disk.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub on: Vec<Layer>,
}

/// A kind of block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A whole disk of hardware.
    Disk(Disk),
    /// A partition of the device beneath.
    Partition,
    /// A mapping of the device mapper, such as `LVM`, by the prefix of its UUID.
    Mapping(String),
    /// A mapping that encrypts, by its name.
    Crypt(String),
    /// An md array, of this level.
    Array(String),
    /// A loop device: it stands on the device that its file's filesystem is on.
    Loop,
    /// Memory: zram that writes nothing back.
    Memory,
    /// Something that stands on no disk that is known, such as a network device.
    Other,
}

impl Layer {
    /// The device with this number and everything beneath it.
    pub fn of(number: DevNum) -> Result<Self> {
        Self::under(Path::new("/sys/dev/block"), number, 0)
    }

    pub(super) fn under(sys: &Path, number: DevNum, depth: usize) -> Result<Self> {
        if depth > DEEPEST {
            bail!("the devices beneath {number} go deeper than {DEEPEST} layers");
        }
        let link = sys.join(number.to_string());
        let doing = || format!("looking at the device {number}");
        let dir = fs::canonicalize(&link).with_context(doing)?;
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = |path: &str| block::attribute(&dir, &[path]);
        let sectors: u64 = text("size")?.unwrap_or_default().parse().with_context(doing)?;
        let size = sectors * 512;
        let mut beneath = Vec::new();
        let kind = if dir.join("partition").exists() {
            let parent = dir.parent().context("a partition without a disk").with_context(doing)?;
            beneath.extend(number_in(parent)?);
            Kind::Partition
        } else if dir.join("dm").exists() {
            let uuid = text("dm/uuid")?.unwrap_or_default();
            let prefix = uuid.split('-').next().filter(|p| !p.is_empty()).unwrap_or("unnamed");
            beneath = slaves(&dir)?;
            if encrypts(&uuid) {
                Kind::Crypt(text("dm/name")?.unwrap_or_else(|| name.clone()))
            } else {
                Kind::Mapping(prefix.to_owned())
            }
        } else if name.starts_with("zram") {
            // The attribute is there only in kernels that can write back.
            match text("backing_dev")?.as_deref() {
                None | Some("none") => Kind::Memory,
                Some(backing) => {
                    beneath.push(device_of(Path::new(backing))?);
                    Kind::Other
                }
            }
        } else if let Some(backing) = text("loop/backing_file")? {
            beneath.push(device_of(Path::new(&backing))?);
            Kind::Loop
        } else if dir.join("md").exists() {
            beneath = slaves(&dir)?;
            Kind::Array(text("md/level")?.unwrap_or_default())
        } else if dir.join("device").exists() {
            match block::disk_in(&dir)? {
                Some(disk) => Kind::Disk(disk),
                None => bail!("{name} went away while it was looked at"),
            }
        } else {
            Kind::Other
        };
        let on = beneath
            .into_iter()
            .map(|number| Self::under(sys, number, depth + 1))
            .collect::<Result<_>>()?;
        Ok(Self { name, number, size, kind, on })
    }

    /// What it stands on in the end, each once: a disk, or the name of what is none.
    #[must_use]
    pub fn ends(&self) -> Vec<Result<&Disk, &str>> {
        let mut ends = Vec::new();
        self.collect(&mut ends);
        ends
    }

    fn collect<'a>(&'a self, ends: &mut Vec<Result<&'a Disk, &'a str>>) {
        let end = match &self.kind {
            Kind::Disk(disk) => Ok(disk),
            // What is in a file stands on a filesystem, and not on a disk. A mapping onto nothing
            // (error, zero) is no disk either.
            Kind::Loop => Err(self.name.as_str()),
            _ if self.on.is_empty() => Err(self.name.as_str()),
            _ => return self.on.iter().for_each(|layer| layer.collect(ends)),
        };
        if !ends.contains(&end) {
            ends.push(end);
        }
    }

    /// The disks, or an error that names what stands on no disk.
    pub fn disks(&self) -> Result<Vec<&Disk>> {
        self.ends()
            .into_iter()
            .map(|end| end.map_err(|name| anyhow::anyhow!("{name} stands on no disk")))
            .collect()
    }

    /// The layers from the top down, each with what it is, as lines with an indent for each layer.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        self.describe(0, &mut lines);
        lines
    }

    fn describe(&self, depth: usize, lines: &mut Vec<String>) {
        let what = match &self.kind {
            Kind::Disk(disk) => match (&disk.serial, disk.volume_id()) {
                (Some(serial), Some(id)) => format!("disk, serial number {serial}: {id}"),
                (Some(serial), None) => format!("disk, serial number {serial}: no EBS volume"),
                (None, Some(id)) => format!("disk, by EC2's mapping: {id}"),
                (None, None) => "disk without a serial number".to_owned(),
            },
            Kind::Partition => "partition".to_owned(),
            Kind::Mapping(prefix) => format!("device mapper ({prefix})"),
            Kind::Crypt(name) => format!("device mapper (CRYPT), {name}"),
            Kind::Array(level) => format!("md array ({level})"),
            Kind::Loop => "loop device".to_owned(),
            Kind::Memory => "memory".to_owned(),
            Kind::Other => "no disk".to_owned(),
        };
        lines.push(format!("{}{} ({}) {what}", "  ".repeat(depth), self.name, self.number));
        self.on.iter().for_each(|layer| layer.describe(depth + 1, lines));
    }
}

/// The disks beneath the filesystem that a path is on. None for a filesystem without a device
/// (tmpfs, overlay, network).
pub fn disks_beneath(path: &Path) -> Result<Vec<Disk>> {
    let meta = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    let number = DevNum::of(meta.dev());
    if number.major == 0 {
        return Ok(Vec::new());
    }
    Ok(Layer::of(number)?.disks()?.into_iter().cloned().collect())
}

/// Where udev links to devices by the UUID of the filesystem on them.
pub const BY_UUID: &str = "/dev/disk/by-uuid";

/// The stable name of a device, that a mount unit may use because no other device gets it at the next
/// boot: udev's link with the disk's serial number, or with the mapping's or the array's UUID. None
/// while udev has not made it. On Xen it is the link with the UUID of the filesystem that hostagent
/// makes on that volume, whether there is one yet or not.
pub fn stable_name(layer: &Layer) -> Result<Option<PathBuf>> {
    let has_part: &dyn Fn(&str) -> bool = match &layer.kind {
        Kind::Disk(Disk { told_by: ToldBy::Mapping(volume), .. }) => {
            // The kernel's name is that of any volume which is attached under EC2's.
            let by_uuid = |id: &VolumeId| Path::new(BY_UUID).join(id.filesystem_uuid().to_string());
            return Ok(volume.as_ref().map(by_uuid));
        }
        Kind::Disk(Disk { serial: Some(serial), .. }) => &|name| name.contains(serial.as_str()),
        Kind::Disk(_) | Kind::Partition | Kind::Loop | Kind::Memory | Kind::Other => {
            return Ok(None);
        }
        Kind::Mapping(_) | Kind::Crypt(_) => &|name| name.starts_with("dm-uuid-"),
        Kind::Array(_) => &|name| name.starts_with("md-uuid-"),
    };
    let dir = Path::new("/dev/disk/by-id");
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).context("listing /dev/disk/by-id"),
    };
    let mut links = Vec::new();
    for entry in entries {
        let link = entry.context("listing /dev/disk/by-id")?.path();
        let name = link.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // A link is a hint: what it leads to is what counts.
        if has_part(&name)
            && fs::metadata(&link).is_ok_and(|m| DevNum::of(m.rdev()) == layer.number)
        {
            links.push(link);
        }
    }
    // With the namespace's number first: udev's rules call the shorter form obsolete.
    links.sort_by_key(|link| (!link.to_string_lossy().ends_with("_1"), link.clone()));
    Ok(links.into_iter().next())
}

/// The device that a path is, if it is a device file, or that its filesystem is on.
fn device_of(path: &Path) -> Result<DevNum> {
    let meta = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    let is_device = meta.file_type().is_block_device();
    Ok(DevNum::of(if is_device { meta.rdev() } else { meta.dev() }))
}

/// Whether a device mapper target with this UUID encrypts. cryptsetup gives its UUIDs the prefix
/// `CRYPT-`, to integrity and verity targets too, which hide nothing.
fn encrypts(uuid: &str) -> bool {
    ["CRYPT-LUKS1-", "CRYPT-LUKS2-", "CRYPT-PLAIN-"].iter().any(|kind| uuid.starts_with(kind))
}

fn number_in(dir: &Path) -> Result<Option<DevNum>> {
    Ok(block::attribute(dir, &["dev"])?.as_deref().and_then(DevNum::parse))
}

/// The devices that a mapping or an array is made of.
fn slaves(dir: &Path) -> Result<Vec<DevNum>> {
    let path: PathBuf = dir.join("slaves");
    let doing = || format!("listing {}", path.display());
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e).with_context(doing),
    };
    let mut numbers = Vec::new();
    for entry in entries {
        let slave = entry.with_context(doing)?.path();
        let Some(number) = number_in(&slave)? else {
            bail!("{} has no device number", slave.display());
        };
        numbers.push(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A sysfs: devices below `devices`, and links to them by number below `dev`.
    pub(in super::super) struct Sys(tempfile::TempDir);

    impl Sys {
        pub(in super::super) fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir_all(root.path().join("dev")).unwrap();
            Self(root)
        }

        pub(in super::super) fn device(
            &self,
            path: &str,
            number: &str,
            attributes: &[(&str, &str)],
        ) {
            let dir = self.0.path().join("devices").join(path);
            fs::create_dir_all(&dir).unwrap();
            for (name, value) in [("dev", number), ("size", "16777216")].iter().chain(attributes) {
                let file = dir.join(name);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, format!("{value}\n")).unwrap();
            }
            symlink(&dir, self.0.path().join("dev").join(number)).unwrap();
        }

        pub(in super::super) fn disk(&self, name: &str, number: &str, serial: &str) {
            self.device(name, number, &[("device/serial", serial)]);
        }

        pub(in super::super) fn slave(&self, upper: &str, lower: &str) {
            let slaves = self.0.path().join("devices").join(upper).join("slaves");
            fs::create_dir_all(&slaves).unwrap();
            let name = Path::new(lower).file_name().unwrap();
            symlink(self.0.path().join("devices").join(lower), slaves.join(name)).unwrap();
        }

        pub(in super::super) fn layer(&self, number: &str) -> Result<Layer> {
            Layer::under(&self.0.path().join("dev"), DevNum::parse(number).unwrap(), 0)
        }
    }

    #[test]
    fn every_layer_is_followed_down_to_every_disk() {
        let sys = Sys::new();
        sys.disk("nvme1n1", "259:1", "vol0aaaaaaaaaaaaaaa1");
        sys.disk("nvme2n1", "259:2", "vol0aaaaaaaaaaaaaaa2");
        sys.device("nvme2n1/nvme2n1p1", "259:3", &[("partition", "1")]);
        sys.device("md0", "9:0", &[("md/level", "raid1")]);
        sys.slave("md0", "nvme1n1");
        sys.slave("md0", "nvme2n1/nvme2n1p1");
        sys.device("dm-0", "253:0", &[("dm/uuid", "CRYPT-LUKS2-abc-data"), ("dm/name", "data")]);
        sys.slave("dm-0", "md0");
        sys.device("dm-1", "253:1", &[("dm/uuid", "LVM-xyz")]);
        sys.slave("dm-1", "dm-0");
        let top = sys.layer("253:1").unwrap();
        let serials: Vec<_> =
            top.disks().unwrap().iter().map(|d| d.serial.clone().unwrap()).collect();
        assert_eq!(serials, ["vol0aaaaaaaaaaaaaaa1", "vol0aaaaaaaaaaaaaaa2"]);
        assert_eq!(
            top.lines(),
            [
                "dm-1 (253:1) device mapper (LVM)",
                "  dm-0 (253:0) device mapper (CRYPT), data",
                "    md0 (9:0) md array (raid1)",
                "      nvme1n1 (259:1) disk, serial number vol0aaaaaaaaaaaaaaa1: vol-0aaaaaaaaaaaaaaa1",
                "      nvme2n1p1 (259:3) partition",
                "        nvme2n1 (259:2) disk, serial number vol0aaaaaaaaaaaaaaa2: vol-0aaaaaaaaaaaaaaa2",
            ]
        );
    }

    #[test]
    fn what_stands_on_no_disk_is_said() {
        let sys = Sys::new();
        sys.device("loop0", "7:0", &[]);
        sys.device("dm-0", "253:0", &[("dm/uuid", "")]);
        sys.disk("nvme1n1", "259:1", "vol0aaaaaaaaaaaaaaa1");
        sys.device("dm-1", "253:1", &[("dm/uuid", "LVM-x")]);
        sys.slave("dm-1", "nvme1n1");
        sys.slave("dm-1", "loop0");
        for (number, name) in [("7:0", "loop0"), ("253:0", "dm-0"), ("253:1", "loop0")] {
            let error = sys.layer(number).unwrap().disks().unwrap_err().to_string();
            assert_eq!(error, format!("{name} stands on no disk"));
        }
        assert!(sys.layer("1:1").is_err(), "a device that is not there");
    }

    #[test]
    fn on_xen_the_stable_name_is_the_filesystems() {
        let sys = Sys::new();
        sys.device("xvdf", "202:80", &[("device/devtype", "vbd"), ("diskseq", "9")]);
        let mut layer = sys.layer("202:80").unwrap();
        assert_eq!(stable_name(&layer).unwrap(), None, "its volume is not known");
        let Kind::Disk(disk) = &mut layer.kind else { panic!("{layer:?}") };
        disk.told_by = ToldBy::Mapping(VolumeId::parse("vol-0123456789abcdef0"));
        let uuid = "/dev/disk/by-uuid/f0b4e71b-1faa-5482-8fe4-ee9f5521efef";
        assert_eq!(stable_name(&layer).unwrap(), Some(uuid.into()));
    }

    #[test]
    fn a_loop_of_devices_ends() {
        let sys = Sys::new();
        sys.device("dm-0", "253:0", &[("dm/uuid", "LVM-x")]);
        sys.slave("dm-0", "dm-0");
        assert!(format!("{:#}", sys.layer("253:0").unwrap_err()).contains("deeper than"));
    }

    #[test]
    fn a_filesystem_without_a_device_stands_on_no_disk() {
        assert_eq!(disks_beneath(Path::new("/proc")).unwrap(), []);
    }
}
