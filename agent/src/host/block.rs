//! Block devices: which disks the kernel has, which EBS volume each is, and who uses them. Nothing
//! here reads what is on a disk ([`super::content`]) or writes to one ([`super::format`]).
//!
//! A disk is identified by its serial number and never by its name: on Nitro the serial of an EBS
//! disk is the volume id without its dash (EC2 User Guide, "EBS volumes and NVMe"); kernel names
//! depend on the order in which devices answer and change between boots.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::mounts;

/// The model of instance-store disks, which are never a data volume.
const INSTANCE_STORE: &str = "Amazon EC2 NVMe Instance Storage";

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DevNum {
    /// The driver.
    pub major: u32,
    /// The device of that driver.
    pub minor: u32,
}

impl DevNum {
    /// From a `dev_t`, as in `stat(2)`.
    #[must_use]
    pub fn of(dev: u64) -> Self {
        let part = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Self { major: part(nix::sys::stat::major(dev)), minor: part(nix::sys::stat::minor(dev)) }
    }

    /// As a `dev_t`.
    #[must_use]
    pub fn raw(self) -> u64 {
        nix::sys::stat::makedev(self.major.into(), self.minor.into())
    }

    /// From `MAJOR:MINOR`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl fmt::Display for DevNum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl Serialize for DevNum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DevNum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("not MAJOR:MINOR"))
    }
}

/// The namespace of the UUIDs that follow from volume ids; drawn once.
const NAMESPACE: uuid::Uuid = uuid::uuid!("9f2b1c54-0d0e-4d53-9d39-1a8c0c1f6c11");

/// The id of an EBS volume, `vol-` and 8 or 17 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeId(String);

impl VolumeId {
    /// From EC2's spelling.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        text.strip_prefix("vol-").filter(|s| is_resource_suffix(s)).map(|_| Self(text.to_owned()))
    }

    /// From a disk's serial number, which has no dash.
    #[must_use]
    pub fn from_serial(serial: &str) -> Option<Self> {
        let rest = serial.trim().strip_prefix("vol")?;
        Self::parse(&format!("vol-{}", rest.strip_prefix('-').unwrap_or(rest)))
    }

    /// EC2's spelling.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The UUID of the filesystem that hostagent makes on this volume. It follows from the volume's
    /// id (RFC 9562, version 5), so that whether a filesystem is ours can be told from the disk
    /// alone, and a copy of it on another volume is not.
    #[must_use]
    pub fn filesystem_uuid(&self) -> uuid::Uuid {
        uuid::Uuid::new_v5(&NAMESPACE, self.0.as_bytes())
    }
}

impl TryFrom<String> for VolumeId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("{text:?} is not a volume id"))
    }
}

impl From<VolumeId> for String {
    fn from(id: VolumeId) -> Self {
        id.0
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The volumes that carry one filesystem: one, or several beneath LVM or md. Sorted, each once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<VolumeId>", into = "Vec<VolumeId>")]
pub struct Volumes(Vec<VolumeId>);

impl Volumes {
    /// The volumes' ids in order.
    #[must_use]
    pub fn ids(&self) -> &[VolumeId] {
        &self.0
    }

    /// What stands for them in the name of a file: the id, or the UUID that follows from several.
    #[must_use]
    pub fn key(&self) -> String {
        match &self.0[..] {
            [id] => id.to_string(),
            _ => self.filesystem_uuid().to_string(),
        }
    }

    /// The UUID of the filesystem that hostagent makes on them, see [`VolumeId::filesystem_uuid`].
    #[must_use]
    pub fn filesystem_uuid(&self) -> uuid::Uuid {
        let ids: Vec<&str> = self.0.iter().map(VolumeId::as_str).collect();
        uuid::Uuid::new_v5(&NAMESPACE, ids.join(",").as_bytes())
    }
}

impl From<Vec<VolumeId>> for Volumes {
    fn from(mut ids: Vec<VolumeId>) -> Self {
        ids.sort();
        ids.dedup();
        Self(ids)
    }
}

impl From<VolumeId> for Volumes {
    fn from(id: VolumeId) -> Self {
        Self(vec![id])
    }
}

impl From<Volumes> for Vec<VolumeId> {
    fn from(volumes: Volumes) -> Self {
        volumes.0
    }
}

impl fmt::Display for Volumes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<&str> = self.0.iter().map(VolumeId::as_str).collect();
        f.write_str(&ids.join(" and "))
    }
}

/// Whether a text is what follows the dash of an EC2 resource id.
#[must_use]
pub fn is_resource_suffix(text: &str) -> bool {
    let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    matches!(text.len(), 8 | 17) && text.chars().all(hex)
}

/// A whole disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The kernel's name at this moment.
    pub name: String,
    /// Its device number.
    pub number: DevNum,
    /// The serial number the disk reports.
    pub serial: Option<String>,
    /// The model the disk reports.
    pub model: Option<String>,
    /// Its size in bytes.
    pub size: u64,
    /// How its volume is told.
    #[serde(default)]
    pub told_by: ToldBy,
    /// Which of all disks since the boot it is, where no serial number tells: another one that comes
    /// under the same name, of the same size, has another number (sysfs(5), `diskseq`, Linux 5.15).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
}

/// How the volume of a disk is told.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToldBy {
    /// By its serial number.
    #[default]
    Serial,
    /// By the kernel's name, which on Xen follows from the name in EC2's block device mapping (EC2
    /// User Guide, "Device names for volumes"): the volume, once EC2's mapping was looked at.
    Mapping(Option<VolumeId>),
}

impl Disk {
    /// The EBS volume this disk is, if its serial number or EC2's mapping says so and it is no
    /// instance store.
    #[must_use]
    pub fn volume_id(&self) -> Option<VolumeId> {
        if let ToldBy::Mapping(volume) = &self.told_by {
            return volume.clone();
        }
        if self.model.as_deref() == Some(INSTANCE_STORE) {
            return None;
        }
        VolumeId::from_serial(self.serial.as_deref()?)
    }

    /// Its device file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }
}

/// The first of these attributes of a sysfs directory that is there and not empty.
pub(super) fn attribute(dir: &Path, names: &[&str]) -> Result<Option<String>> {
    for name in names {
        let path = dir.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => return Ok(Some(text.trim().to_owned()).filter(|t| !t.is_empty())),
            // ENODEV: the device went away between the listing and the reading.
            Err(e)
                if e.kind() == ErrorKind::NotFound
                    || e.raw_os_error() == Some(nix::libc::ENODEV) => {}
            Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
        }
    }
    Ok(None)
}

/// All whole disks that are hardware: no loop devices, no device mapper, and none that the kernel
/// hides (the per-path nodes of multipath NVMe carry the volume's serial but have no device file).
pub fn disks() -> Result<Vec<Disk>> {
    disks_under(Path::new("/sys/block"))
}

fn disks_under(sys_block: &Path) -> Result<Vec<Disk>> {
    let doing = || format!("listing {}", sys_block.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(sys_block).with_context(doing)? {
        let dir = entry.with_context(doing)?.path();
        if !dir.join("device").exists() || attribute(&dir, &["hidden"])?.as_deref() == Some("1") {
            continue;
        }
        found.extend(disk_in(&dir)?);
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The disk whose sysfs directory this is; none if it went away meanwhile.
pub(super) fn disk_in(dir: &Path) -> Result<Option<Disk>> {
    let number = attribute(dir, &["dev"])?.as_deref().and_then(DevNum::parse);
    // `size` counts 512-byte sectors whatever the disk's own sector size is.
    let (Some(number), Some(sectors)) = (number, attribute(dir, &["size"])?) else {
        return Ok(None);
    };
    let sectors: u64 =
        sectors.parse().with_context(|| format!("reading {}/size", dir.display()))?;
    // Xen's block devices name their kind on the Xen bus, and have no serial number.
    let xen = attribute(dir, &["device/devtype"])?.as_deref() == Some("vbd");
    let sequence = if xen { attribute(dir, &["diskseq"])? } else { None };
    Ok(Some(Disk {
        name: dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        number,
        // NVMe has it below `device`, virtio beside it.
        serial: attribute(dir, &["device/serial", "serial"])?,
        model: attribute(dir, &["device/model"])?,
        size: sectors * 512,
        told_by: if xen { ToldBy::Mapping(None) } else { ToldBy::Serial },
        sequence: sequence.and_then(|text| text.parse().ok()),
    }))
}

/// The size in bytes of the sectors in which a disk stores its data; what a filesystem should use.
pub fn physical_block_size(device: DevNum) -> Result<u64> {
    let dir = PathBuf::from(format!("/sys/dev/block/{device}"));
    attribute(&dir, &["queue/physical_block_size"])?
        .and_then(|text| text.parse().ok())
        .with_context(|| format!("the kernel does not tell the size of the sectors of {device}"))
}

/// Who uses a device: partitions, device mapper and md above it, mounts, swap. Empty means nobody.
pub fn users(device: DevNum) -> Result<Vec<String>> {
    let swaps = fs::read_to_string("/proc/swaps").context("reading /proc/swaps")?;
    users_under(Path::new("/sys/dev/block"), device, &mounts::all()?, &swaps)
}

fn users_under(
    sys: &Path,
    device: DevNum,
    mounts: &[mounts::Mount],
    swaps: &str,
) -> Result<Vec<String>> {
    let dir = sys.join(device.to_string());
    let mut users = Vec::new();
    let mut numbers = vec![device];
    for entry in fs::read_dir(&dir).with_context(|| format!("listing {}", dir.display()))? {
        let path = entry.with_context(|| format!("listing {}", dir.display()))?.path();
        if path.join("partition").exists() {
            users.push(format!(
                "partition {}",
                path.file_name().unwrap_or_default().to_string_lossy()
            ));
            numbers.extend(attribute(&path, &["dev"])?.as_deref().and_then(DevNum::parse));
            users.extend(holders(&path)?);
        }
    }
    users.extend(holders(&dir)?);
    for mount in mounts {
        if numbers.contains(&mount.device) {
            users.push(format!("mounted on {}", mount.mount_point));
        }
    }
    for line in swaps.lines().skip(1) {
        let Some(file) = line.split_whitespace().next() else { continue };
        let meta = fs::metadata(file).with_context(|| format!("looking at the swap {file}"))?;
        let number = if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() };
        if numbers.contains(&DevNum::of(number)) {
            users.push(format!("swap {file}"));
        }
    }
    Ok(users)
}

fn holders(dir: &Path) -> Result<Vec<String>> {
    let path = dir.join("holders");
    let mut names = Vec::new();
    for entry in fs::read_dir(&path).with_context(|| format!("listing {}", path.display()))? {
        let entry = entry.with_context(|| format!("listing {}", path.display()))?;
        names.push(format!("held by {}", entry.file_name().to_string_lossy()));
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8 << 30;

    #[test]
    fn volume_ids_come_from_serials_with_or_without_dash() {
        let id = VolumeId::parse("vol-0123456789abcdef0").unwrap();
        for serial in ["vol0123456789abcdef0", "vol0123456789abcdef0   ", "vol-0123456789abcdef0"] {
            assert_eq!(VolumeId::from_serial(serial), Some(id.clone()), "{serial:?}");
        }
        for serial in ["", "vol", "vol012345678", "vol0123456789ABCDEF0", "AWS0123456789abcdef0"] {
            assert_eq!(VolumeId::from_serial(serial), None, "{serial:?}");
        }
        assert!(VolumeId::from_serial("vol12345678").is_some(), "the old, short form");
    }

    #[test]
    fn the_filesystems_uuid_follows_from_the_volume() {
        let id = |text: &str| VolumeId::parse(text).unwrap().filesystem_uuid();
        // Frozen: another value would make every existing host's volume "not ours".
        assert_eq!(id("vol-0123456789abcdef0").to_string(), "f0b4e71b-1faa-5482-8fe4-ee9f5521efef");
        assert_ne!(id("vol-0123456789abcdef0"), id("vol-0123456789abcdef1"));
    }

    #[test]
    fn partitions_holders_mounts_and_swap_use_a_device() {
        let sys = tempfile::tempdir().unwrap();
        let number = |minor| DevNum { major: 259, minor };
        let dir = |path: &str| {
            let dir = sys.path().join(path);
            fs::create_dir_all(&dir).unwrap();
            dir
        };
        let mount = |device| mounts::Mount {
            device,
            root: "/".into(),
            mount_point: "/srv".into(),
            fs_type: "ext4".into(),
            options: vec![],
            read_only: false,
        };
        let head = "Filename Type Size Used Priority\n";
        let told = |mounts: &[mounts::Mount], swaps: &str| {
            users_under(sys.path(), number(1), mounts, &format!("{head}{swaps}"))
        };
        assert!(told(&[], "").is_err(), "a device that cannot be looked at is not free");
        dir("259:1/holders");
        let nobody: [&str; 0] = [];
        assert_eq!(told(&[mount(number(7))], "").unwrap(), nobody);
        assert_eq!(told(&[mount(number(1))], "").unwrap(), ["mounted on /srv"]);

        // A swap file on it: here, the device that a temporary file is on.
        let file = sys.path().join("swapfile");
        fs::write(&file, "").unwrap();
        let swaps = format!("{head}{} file 1024 0 -2\n", file.display());
        let here = DevNum::of(fs::metadata(&file).unwrap().dev());
        dir(&format!("{here}/holders"));
        let on_it = users_under(sys.path(), here, &[], &swaps).unwrap();
        assert_eq!(on_it, [format!("swap {}", file.display())]);
        assert_eq!(users_under(sys.path(), number(1), &[], &swaps).unwrap(), nobody);
        // One that cannot be looked at may be on it.
        assert!(told(&[], "/no/such/swap file 1024 0 -2\n").is_err());

        dir("259:1/holders/dm-0");
        assert_eq!(told(&[], "").unwrap(), ["held by dm-0"]);
        fs::write(dir("259:1/nvme1n1p1").join("partition"), "1\n").unwrap();
        fs::write(dir("259:1/nvme1n1p1").join("dev"), "259:2\n").unwrap();
        dir("259:1/nvme1n1p1/holders/md0");
        assert_eq!(
            told(&[mount(number(2))], "").unwrap(),
            ["partition nvme1n1p1", "held by md0", "held by dm-0", "mounted on /srv"]
        );
    }

    #[test]
    fn a_device_of_swap_is_in_use() {
        let Some(device) = super::super::loops::Loop::new(1 << 20) else { return };
        assert_eq!(users(device.number).unwrap(), Vec::<String>::new());
        let dir = PathBuf::from("/sys/dev/block");
        let swaps = format!("Filename\n{} partition 1020 0 -2\n", device.path.display());
        let users = users_under(&dir, device.number, &[], &swaps).unwrap();
        assert_eq!(users, [format!("swap {}", device.path.display())]);
    }

    #[test]
    fn hidden_and_virtual_disks_are_left_out() {
        let root = tempfile::tempdir().unwrap();
        let disk = |name: &str, hidden: &str, device: bool, serial: &str| {
            let dir = root.path().join(name);
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("dev"), "259:3\n").unwrap();
            fs::write(dir.join("size"), "16777216\n").unwrap();
            fs::write(dir.join("hidden"), hidden).unwrap();
            if device {
                fs::create_dir_all(dir.join("device")).unwrap();
                fs::write(dir.join("device/serial"), serial).unwrap();
                fs::write(dir.join("device/model"), "Amazon Elastic Block Store   \n").unwrap();
            }
        };
        disk("nvme0n1", "0\n", true, "vol0123456789abcdef0\n");
        disk("nvme0c0n1", "1\n", true, "vol0123456789abcdef0\n");
        disk("loop0", "0\n", false, "");
        let found = disks_under(root.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "nvme0n1");
        assert_eq!(found[0].size, SIZE);
        assert_eq!(found[0].volume_id(), VolumeId::parse("vol-0123456789abcdef0"));
        disk("xvdf", "0\n", true, "");
        let xen = root.path().join("xvdf/device");
        fs::remove_file(xen.join("model")).unwrap();
        fs::write(xen.join("devtype"), "vbd\n").unwrap();
        let found = disks_under(root.path()).unwrap();
        assert_eq!((found[1].name.as_str(), found[1].volume_id()), ("xvdf", None));
        assert_eq!(found[1].told_by, ToldBy::Mapping(None), "a disk of Xen's has no serial number");
        // Another of the same name and size.
        fs::write(root.path().join("xvdf/diskseq"), "17\n").unwrap();
        fs::write(root.path().join("nvme0n1/diskseq"), "17\n").unwrap();
        let again = disks_under(root.path()).unwrap();
        assert_eq!((&again[0], again[1].sequence), (&found[0], Some(17)));
        assert_ne!(again[1], found[1]);
        let store = Disk { model: Some(INSTANCE_STORE.into()), ..found[0].clone() };
        assert_eq!(store.volume_id(), None, "an instance store is never a volume");
    }
}
