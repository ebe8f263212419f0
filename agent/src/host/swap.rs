//! Swap: what the kernel swaps to now, and what systemd will have it swap to at the next boot.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use procfs::Current as _;
use serde::{Deserialize, Serialize};

use super::block::DevNum;
use super::files;
use super::ground::{self, Ground};
use super::mounts::unit_name;
use super::systemd::Systemd;

/// A file or device that the kernel swaps to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swap {
    /// As `/proc/swaps` names it.
    pub path: String,
    /// How much of it is in use, in bytes.
    pub used: u64,
    /// Where it is.
    pub place: Place,
}

/// Where a swap file or device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The filesystem of a swap file; none for a device.
    pub filesystem: Option<DevNum>,
    /// What it rests on.
    pub ground: Vec<Ground>,
}

/// Something that is swapped to from the next boot on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The unit that systemd has or will have for it.
    pub unit: String,
    /// The file or device.
    pub path: PathBuf,
    /// The file that says so: a unit's, or `/etc/fstab`.
    pub by: String,
    /// Where it is; none if there is nothing at the path now.
    pub place: Option<Place>,
}

/// What the kernel swaps to now (proc(5), `/proc/swaps`).
pub fn active() -> Result<Vec<Swap>> {
    in_use()?
        .into_iter()
        .map(|(path, used)| {
            let place = place(Path::new(&path))?;
            let place = place.with_context(|| format!("the swap {path} is not there any more"))?;
            Ok(Swap { path, used, place })
        })
        .collect()
}

/// What the kernel swaps to, and how many bytes of it are in use.
pub fn in_use() -> Result<Vec<(String, u64)>> {
    parse_swaps(&fs::read_to_string("/proc/swaps").context("reading /proc/swaps")?)
}

/// Path and bytes in use of each line.
fn parse_swaps(text: &str) -> Result<Vec<(String, u64)>> {
    let lines = text.lines().skip(1).filter(|line| !line.trim().is_empty());
    lines
        .map(|line| {
            let doing = || format!("reading /proc/swaps: {line:?}");
            let fields: Vec<&str> = line.split_whitespace().collect();
            ensure!(fields.len() == 5, doing());
            let kibibytes: u64 = fields[3].parse().with_context(doing)?;
            Ok((unescape(fields[0]), kibibytes * 1024))
        })
        .collect()
}

fn place(path: &Path) -> Result<Option<Place>> {
    let Some(ground) = ground::of_path(path)? else { return Ok(None) };
    let doing = || format!("looking at {}", path.display());
    let meta = fs::metadata(path).with_context(doing)?;
    let is_device = meta.file_type().is_block_device();
    let filesystem = (!is_device).then(|| DevNum::of(meta.dev()));
    Ok(Some(Place { filesystem, ground }))
}

/// What starts swap at the next boot: units that something pulls in, units that are enabled on disk,
/// and lines of `/etc/fstab` that systemd may not have read yet. What is masked or barred starts
/// nothing.
pub async fn starts(systemd: &Systemd) -> Result<Vec<Start>> {
    let mut found: BTreeMap<String, Option<String>> = BTreeMap::new();
    for name in systemd.units_like("*.swap").await? {
        found.insert(name, None);
    }
    for name in systemd.enabled_like("*.swap").await? {
        found.insert(name, Some("an enabled unit".into()));
    }
    let fstab = "/etc/fstab";
    for path in parse_fstab(&files::read_optional(Path::new(fstab))?.unwrap_or_default()) {
        found.insert(unit_name(&path, "swap"), Some(fstab.into()));
    }
    let mut starts = Vec::new();
    for (unit, by) in found {
        let loaded = systemd.unit(&unit).await?;
        // Without a file it is there because the kernel swaps to it, or because it once did.
        let pulled_in = !loaded.fragment_path.is_empty() && !loaded.wanted_by.is_empty();
        let barred = loaded.barred && !loaded.need_daemon_reload;
        if loaded.load_state == "masked" || barred || (by.is_none() && !pulled_in) {
            continue;
        }
        let path = path_of_unit(&unit);
        let place = place(&path)?;
        starts.push(Start { unit, path, by: by.unwrap_or(loaded.fragment_path), place });
    }
    Ok(starts)
}

/// What the lines of an fstab(5) swap to at boot.
fn parse_fstab(text: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in text.lines().filter(|line| !line.trim_start().starts_with('#')) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (Some(what), Some(kind)) = (fields.first(), fields.get(2)) else { continue };
        let options = fields.get(3).copied().unwrap_or_default();
        if *kind == "swap" && !options.split(',').any(|option| option == "noauto") {
            found.push(device_of(&unescape(what)));
        }
    }
    found
}

/// The path that systemd makes of the first field of a line of fstab.
fn device_of(what: &str) -> PathBuf {
    for (tag, dir) in [
        ("UUID=", "uuid"),
        ("LABEL=", "label"),
        ("PARTUUID=", "partuuid"),
        ("PARTLABEL=", "partlabel"),
    ] {
        if let Some(value) = what.strip_prefix(tag) {
            return Path::new("/dev/disk").join(format!("by-{dir}")).join(value.trim_matches('"'));
        }
    }
    PathBuf::from(what)
}

/// The path that a `.swap` unit stands for: the inverse of [`unit_name`].
fn path_of_unit(unit: &str) -> PathBuf {
    let name = unit.strip_suffix(".swap").unwrap_or(unit);
    let mut bytes = vec![b'/'];
    let mut rest = name.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        let escaped = || std::str::from_utf8(after.get(1..3)?).ok();
        match (first, after.first()) {
            (b'-', _) => bytes.push(b'/'),
            (b'\\', Some(b'x')) if let Some(byte) = escaped().and_then(hex) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => bytes.push(*first),
        }
    }
    PathBuf::from(String::from_utf8_lossy(&bytes).into_owned())
}

fn hex(digits: &str) -> Option<u8> {
    u8::from_str_radix(digits, 16).ok()
}

/// Undoes the octal escapes of `/proc/swaps` and fstab(5).
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (escape, plain)| text.replace(escape, plain))
}

/// How many bytes of memory can be had without swapping.
pub fn available_memory() -> Result<u64> {
    let info = procfs::Meminfo::current().context("reading /proc/meminfo")?;
    info.mem_available.context("reading /proc/meminfo: there is no MemAvailable")
}

/// Whether what is swapped out fits into memory, with something to spare. An empty swap always does.
#[must_use]
pub fn fits(used: u64, available: u64) -> bool {
    const SPARE: u64 = 64 << 20;
    used == 0 || used.saturating_add(SPARE) <= available
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
                    /swap\\040file                           file\t\t524284\t\t1024\t\t-2\n\
                    /dev/zram0                              partition\t1048572\t\t0\t\t100\n";
        let swaps = parse_swaps(text).unwrap();
        assert_eq!(swaps, [("/swap file".into(), 1 << 20), ("/dev/zram0".into(), 0)]);
        assert!(parse_swaps("Filename\n").unwrap().is_empty());
        assert!(parse_swaps("Filename\n/swapfile file\n").is_err());
    }

    #[test]
    fn fstab_says_what_is_swapped_to_at_boot() {
        let text = "# /old none swap sw 0 0\n\
                    /dev/vda / ext4 defaults 0 1\n\
                    /swapfile none swap sw 0 0\n\
                    UUID=1b-2c\tswap\tswap\tdefaults\n\
                    LABEL=\"spare\" none swap\n\
                    /later none swap noauto,pri=1 0 0\n\
                    \n";
        let expected = ["/swapfile", "/dev/disk/by-uuid/1b-2c", "/dev/disk/by-label/spare"];
        assert_eq!(parse_fstab(text), expected.map(PathBuf::from));
    }

    #[test]
    fn units_and_paths_are_told_from_each_other() {
        for path in ["/swapfile", "/dev/disk/by-uuid/1b-2c", "/data/my swap.1", "/a\\b"] {
            let unit = unit_name(Path::new(path), "swap");
            assert_eq!(path_of_unit(&unit), Path::new(path), "{unit}");
        }
        assert_eq!(path_of_unit("a\\x2.swap"), Path::new("/a\\x2"));
    }

    proptest::proptest! {
        #[test]
        fn a_path_is_told_from_its_unit(path in "(/[a-zA-Z0-9:_. \\\\-]{1,9}){1,4}") {
            let unit = unit_name(Path::new(&path), "swap");
            proptest::prop_assert_eq!(path_of_unit(&unit), Path::new(&path));
        }
    }

    #[test]
    fn memory_is_counted() {
        assert!(available_memory().unwrap() > 1 << 20);
    }
}
