//! What is mounted where, from `/proc/self/mountinfo` (proc(5)), and the names of mount units.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use procfs::process::MountInfo;
use serde::{Deserialize, Serialize};

use super::block::DevNum;

/// One line of mountinfo, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// The device number of the filesystem.
    pub device: DevNum,
    /// The directory of that filesystem that is mounted; `/` unless it is a bind mount.
    pub root: String,
    /// Where it is mounted.
    pub mount_point: String,
    /// The filesystem's type.
    pub fs_type: String,
    /// The options of this mount, sorted.
    pub options: Vec<String>,
    /// Whether the filesystem itself is read-only, as ext4 becomes when its journal fails.
    pub read_only: bool,
}

/// All mounts of this process's namespace, in the order in which they were made.
pub fn all() -> Result<Vec<Mount>> {
    let me = procfs::process::Process::myself().context("opening /proc/self")?;
    let infos = me.mountinfo().context("reading /proc/self/mountinfo")?;
    infos.0.into_iter().map(convert).collect()
}

/// The mounts on exactly this path; the last one is what is seen there.
pub fn at(path: &Path) -> Result<Vec<Mount>> {
    Ok(all()?.into_iter().filter(|m| Path::new(&m.mount_point) == path).collect())
}

fn convert(info: MountInfo) -> Result<Mount> {
    let device = DevNum::parse(&info.majmin)
        .with_context(|| format!("reading the device number {:?} in mountinfo", info.majmin))?;
    let mut options: Vec<String> = info
        .mount_options
        .into_iter()
        .map(|(key, value)| value.map_or(key.clone(), |value| format!("{key}={value}")))
        .collect();
    options.sort();
    Ok(Mount {
        device,
        root: info.root,
        mount_point: info.mount_point.to_string_lossy().into_owned(),
        fs_type: info.fs_type,
        options,
        read_only: info.super_options.contains_key("ro"),
    })
}

/// An overlay (kernel documentation, filesystems/overlayfs).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// The directory that takes what is written to it, as it was given; none if nothing can be written.
    pub upper: Option<PathBuf>,
    /// The device that this directory is on; none if it is not found.
    pub device: Option<DevNum>,
}

/// All overlays of this process's namespace.
pub fn overlays() -> Result<Vec<Overlay>> {
    let me = procfs::process::Process::myself().context("opening /proc/self")?;
    let infos = me.mountinfo().context("reading /proc/self/mountinfo")?;
    let overlays = infos.0.into_iter().filter(|info| info.fs_type == "overlay");
    let convert = |mut info: MountInfo| {
        let upper = info.super_options.remove("upperdir").flatten().map(PathBuf::from);
        overlay(info.mount_point, upper)
    };
    overlays.map(convert).collect()
}

fn overlay(mount_point: PathBuf, upper: Option<PathBuf>) -> Result<Overlay> {
    use std::os::unix::fs::MetadataExt as _;
    // With many layers Docker gives it relative to where it keeps them, `merged` among them.
    let above = mount_point.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let device = match upper.as_ref().map(|upper| std::fs::metadata(above.join(upper))) {
        Some(Ok(meta)) => Some(DevNum::of(meta.dev())),
        Some(Err(e)) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| {
                format!("looking at what the overlay on {} writes to", mount_point.display())
            });
        }
        Some(Err(_)) | None => None,
    };
    Ok(Overlay { mount_point, upper, device })
}

/// The name of the unit that stands for a path (systemd.unit(5), "string escaping"), with `suffix`
/// such as `mount` or `device`.
#[must_use]
pub fn unit_name(path: &Path, suffix: &str) -> String {
    use std::fmt::Write as _;
    let text = path.to_string_lossy();
    let trimmed = text.trim_matches('/');
    if trimmed.is_empty() {
        return format!("-.{suffix}");
    }
    let mut name = String::new();
    for (i, byte) in trimmed.bytes().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if i == 0 => name.push_str("\\x2e"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'_' | b'.' => name.push(byte.into()),
            // Writing to a String cannot fail.
            _ => _ = write!(name, "\\x{byte:02x}"),
        }
    }
    format!("{name}.{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_names_are_what_systemd_escape_prints() {
        // Printed by `systemd-escape --path --suffix=mount`.
        let table = [
            ("/data", "data.mount"),
            ("/var/lib/docker", "var-lib-docker.mount"),
            ("/srv/my-data", "srv-my\\x2ddata.mount"),
            ("/", "-.mount"),
            ("/.hidden/a.b", "\\x2ehidden-a.b.mount"),
            ("/dev/disk/by-id/nvme-X_1", "dev-disk-by\\x2did-nvme\\x2dX_1.mount"),
        ];
        for (path, name) in table {
            assert_eq!(unit_name(Path::new(path), "mount"), name);
        }
    }

    #[test]
    fn what_an_overlay_writes_to_is_followed() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let upper = dir.path().join("layers/ab/diff");
        std::fs::create_dir_all(&upper).unwrap();
        let device = Some(DevNum::of(std::fs::metadata(&upper).unwrap().dev()));
        let merged = dir.path().join("layers/ab/merged");
        let seen = |upper: &Path| overlay(merged.clone(), Some(upper.into())).unwrap().device;
        assert_eq!(seen(&upper), device);
        assert_eq!(seen(Path::new("ab/diff")), device);
        assert_eq!(seen(Path::new("cd/diff")), None);
        assert_eq!(overlay(merged.clone(), None).unwrap().device, None);
        overlays().unwrap();
    }

    #[test]
    fn what_is_mounted_is_seen() {
        // Not the root: in a chroot that is no mount point.
        let proc = at(Path::new("/proc")).unwrap();
        assert_eq!(proc.last().map(|m| m.fs_type.as_str()), Some("proc"));
        assert!(at(Path::new("/no/such/mount")).unwrap().is_empty());
    }
}
