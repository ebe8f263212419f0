//! Settings that come from a file and its drop-ins, merged as systemd merges them
//! (systemd.syntax(7), sysctl.d(5)): directories in a fixed order of rank, a file hides those of its
//! name in directories of lower rank, drop-ins are read in the order of their names, and the last
//! assignment counts. This is what the next start reads; what is in force now is told elsewhere.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// One setting, and the file that decides it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The value, trimmed.
    pub value: String,
    /// Where it stands.
    pub file: PathBuf,
    /// When that file was last changed.
    pub changed: Timestamp,
}

/// From the highest rank to the lowest.
const DIRS: [&str; 4] = ["etc", "run", "usr/local/lib", "usr/lib"];

/// A setting of one of systemd's own programs, such as `Storage` in `[Journal]` of `journald.conf`.
/// None if nothing sets it, or the last assignment is empty, which resets it to its default.
pub fn of_systemd(file: &str, section: &str, key: &str) -> Result<Option<Setting>> {
    systemd_under(Path::new("/"), file, section, key)
}

/// A kernel parameter that `systemd-sysctl` sets at boot, such as `kernel.core_pattern`.
pub fn of_sysctl(key: &str) -> Result<Option<Setting>> {
    sysctl_under(Path::new("/"), key)
}

fn systemd_under(root: &Path, file: &str, section: &str, key: &str) -> Result<Option<Setting>> {
    let mut files = Vec::new();
    for dir in DIRS {
        let main = root.join(dir).join("systemd").join(file);
        if main.exists() {
            files.push(main);
            break;
        }
    }
    files.extend(fragments(root, &format!("systemd/{file}.d"))?);
    last(&files, |text| systemd_value(text, section, key))
        .map(|found| found.filter(|setting| !setting.value.is_empty()))
}

fn sysctl_under(root: &Path, key: &str) -> Result<Option<Setting>> {
    last(&fragments(root, "sysctl.d")?, |text| sysctl_value(text, key))
}

/// All `*.conf` of the directories `dir`, in the order in which they are read.
fn fragments(root: &Path, dir: &str) -> Result<Vec<PathBuf>> {
    let mut found = BTreeMap::new();
    for parent in DIRS {
        let dir = root.join(parent).join(dir);
        let doing = || format!("listing {}", dir.display());
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(e).with_context(doing),
        };
        for entry in entries {
            let path = entry.with_context(doing)?.path();
            if path.extension().is_some_and(|ext| ext == "conf") {
                let name = path.file_name().unwrap_or_default().to_owned();
                found.entry(name).or_insert(path);
            }
        }
    }
    Ok(found.into_values().collect())
}

/// The last value that `find` sees in the files.
fn last(files: &[PathBuf], find: impl Fn(&str) -> Option<String>) -> Result<Option<Setting>> {
    let mut found = None;
    for path in files {
        let doing = || format!("reading {}", path.display());
        // A comment may be in any encoding. A link that leads nowhere is passed over by systemd too.
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            Err(e) => return Err(e).with_context(doing),
        };
        if let Some(value) = find(&String::from_utf8_lossy(&bytes)) {
            let changed = fs::metadata(path).and_then(|m| m.modified()).with_context(doing)?;
            let changed = Timestamp::try_from(changed).with_context(doing)?;
            found = Some(Setting { value, file: path.clone(), changed });
        }
    }
    Ok(found)
}

fn systemd_value(text: &str, section: &str, key: &str) -> Option<String> {
    let mut found = None;
    let mut inside = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            inside = name == section;
        } else if let Some((name, value)) = line.split_once('=')
            && inside
            && name.trim() == key
        {
            found = Some(value.trim().to_owned());
        }
    }
    found
}

/// An explicit assignment. Patterns with wildcards are left out: they never replace one.
fn sysctl_value(text: &str, key: &str) -> Option<String> {
    let mut found = None;
    for line in text.lines().map(str::trim) {
        let Some((name, value)) = line.split_once('=') else { continue };
        // A dash before the key: a failure to set it is ignored.
        let name = name.trim().trim_start_matches('-').replace('/', ".");
        if !line.starts_with(['#', ';']) && name == key {
            found = Some(value.trim().to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let top = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = top.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        top
    }

    fn storage(files: &[(&str, &str)]) -> Option<(String, String)> {
        let top = tree(files);
        let found = systemd_under(top.path(), "journald.conf", "Journal", "Storage").unwrap();
        found.map(|s| {
            (s.value, s.file.strip_prefix(top.path()).unwrap().to_string_lossy().into_owned())
        })
    }

    #[test]
    fn drop_ins_count_in_the_order_of_their_names_whatever_their_directory() {
        let main = ("etc/systemd/journald.conf", "[Journal]\n#Storage=none\nStorage=auto\n");
        let vendor = ("usr/lib/systemd/journald.conf.d/20.conf", "[Journal]\nStorage = volatile\n");
        let etc = ("etc/systemd/journald.conf.d/10.conf", "[Journal]\nStorage=persistent");
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(storage(&[]), None);
        assert_eq!(storage(&[main]), pair("auto", main.0));
        assert_eq!(storage(&[main, vendor, etc]), pair("volatile", vendor.0));
        // One of the same name with a higher rank hides it, even an empty one.
        let mask = ("run/systemd/journald.conf.d/20.conf", "");
        assert_eq!(storage(&[main, vendor, etc, mask]), pair("persistent", etc.0));
        // Only one main file is read.
        let low = ("usr/lib/systemd/journald.conf", "[Journal]\nStorage=none\n");
        assert_eq!(storage(&[main, low]), pair("auto", main.0));
        assert_eq!(storage(&[low]), pair("none", low.0));
    }

    #[test]
    fn only_the_right_section_counts_and_an_empty_value_resets() {
        let at = |text| storage(&[("etc/systemd/journald.conf", text)]).map(|s| s.0);
        assert_eq!(at("[Other]\nStorage=none\n"), None);
        assert_eq!(at("Storage=none\n[Journal]\nMaxUse=1\n"), None);
        assert_eq!(at("[Journal]\nStorage=none\nStorage=\n"), None);
        assert_eq!(at("[Journal]\r\nStorage=none\r\n").as_deref(), Some("none"));
    }

    #[test]
    fn kernel_parameters_have_several_spellings() {
        let value = |text: &str| {
            let top = tree(&[
                ("usr/lib/sysctl.d/10-a.conf", "kernel.core_pattern=core\n"),
                ("etc/sysctl.d/50-b.conf", text),
            ]);
            sysctl_under(top.path(), "kernel.core_pattern").unwrap().unwrap().value
        };
        assert_eq!(value("# nothing\n"), "core");
        assert_eq!(value("#kernel.core_pattern=x\n"), "core");
        assert_eq!(value("kernel/core_pattern = |/bin/false a=b\n"), "|/bin/false a=b");
        assert_eq!(value("-kernel.core_pattern=x"), "x");
        assert_eq!(value("kernel.core_pattern_x=x"), "core");
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let top = tree(&[("etc/sysctl.d/50.conf/file", "")]);
        assert!(sysctl_under(top.path(), "kernel.core_pattern").is_err());
        let top = tree(&[("etc/sysctl.d", "")]);
        assert!(sysctl_under(top.path(), "kernel.core_pattern").is_err());
    }
}
