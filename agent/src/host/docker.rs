//! What Docker and containerd have on disk and hold open, told without asking the daemons.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::block::DevNum;

/// What a storage directory holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Storage {
    /// There is no such directory.
    Absent,
    /// A symbolic link stands in its place, to this target.
    Symlink(String),
    /// Something else stands in its place.
    NotADirectory,
    /// Nothing but what a daemon writes at its first start: no image, container, volume or layer.
    Unused,
    /// Something that belongs to somebody, such as this path.
    Used(String),
}

/// Files that the daemons write before there is any image, container or volume (Docker 20.10 to 29,
/// containerd 1.6 to 2.2). Everything else counts as somebody's data. `*` stands for any text
/// within one part of the path.
const HOUSEKEEPING: [&str; 16] = [
    "engine-id",
    "buildkit/*.db",
    "buildkit/*.db.lock",
    "buildkit/*/*.db",
    "image/*/repositories.json",
    "network/files/local-kv.db",
    "volumes/metadata.db",
    "volumes/backingFsBlockDev",
    "overlay2/backingFsBlockDev",
    "containerd/daemon/io.containerd.metadata.v1.bolt/meta.db",
    "io.containerd.metadata.v1.bolt/meta.db",
    "io.containerd.mount-manager.v1.bolt/*.db",
    "io.containerd.snapshotter.v1.*/metadata.db",
    "io.containerd.snapshotter.v1.*/*/metadata.db",
    "io.containerd.grpc.v1.*/*.db",
    "io.containerd.sandbox.*/*.db",
];

/// Directories in which each directory is somebody's even if it is empty.
const NAMED_BY_USERS: [&str; 2] = ["volumes/*", "containers/*"];

/// Looks at a storage directory without following a link in its place.
pub fn storage(path: &Path) -> Result<Storage> {
    storage_at(path, path)
}

/// The same for what a link in its place leads to, if that is a link.
pub fn storage_behind(path: &Path) -> Result<Storage> {
    match fs::canonicalize(path) {
        Ok(real) => storage(&real),
        Err(e) if e.kind() == ErrorKind::NotFound || is_circle(&e) => storage(path),
        Err(e) => Err(e).with_context(|| format!("looking at {}", path.display())),
    }
}

/// Whether links lead in a circle.
pub(super) fn is_circle(e: &std::io::Error) -> bool {
    e.raw_os_error() == Some(nix::libc::ELOOP)
}

/// The same for a directory that is reached at `path` and is `shown` in the answer.
pub fn storage_at(path: &Path, shown: &Path) -> Result<Storage> {
    let doing = || format!("looking at {}", path.display());
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Storage::Absent),
        Err(e) => return Err(e).with_context(doing),
    };
    if meta.is_symlink() {
        let target = fs::read_link(path).with_context(doing)?;
        return Ok(Storage::Symlink(target.display().to_string()));
    }
    if !meta.is_dir() {
        return Ok(Storage::NotADirectory);
    }
    Ok(match first_used(path, path)? {
        None => Storage::Unused,
        Some(found) => {
            let found = found.strip_prefix(path).unwrap_or(&found);
            Storage::Used(shown.join(found).display().to_string())
        }
    })
}

/// The first path under `dir` that is somebody's data.
fn first_used(top: &Path, dir: &Path) -> Result<Option<PathBuf>> {
    let doing = || format!("listing {}", dir.display());
    let mut entries = fs::read_dir(dir)
        .with_context(doing)?
        .collect::<Result<Vec<_>, _>>()
        .with_context(doing)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let kind = entry.file_type().with_context(doing)?;
        let relative = path.strip_prefix(top).unwrap_or(&path).to_string_lossy().into_owned();
        if kind.is_dir() {
            if NAMED_BY_USERS.iter().any(|pattern| matches(pattern, &relative)) {
                return Ok(Some(path));
            }
            if let Some(found) = first_used(top, &path)? {
                return Ok(Some(found));
            }
        } else if !((kind.is_file() || kind.is_block_device())
            && HOUSEKEEPING.iter().any(|pattern| matches(pattern, &relative)))
        {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Whether a relative path has the shape of a pattern.
fn matches(pattern: &str, path: &str) -> bool {
    let (patterns, parts): (Vec<&str>, Vec<&str>) =
        (pattern.split('/').collect(), path.split('/').collect());
    patterns.len() == parts.len()
        && patterns.iter().zip(parts).all(|(pattern, part)| match pattern.split_once('*') {
            Some((head, tail)) => {
                part.len() >= head.len() + tail.len()
                    && part.starts_with(head)
                    && part.ends_with(tail)
            }
            None => *pattern == part,
        })
}

/// A file that a process holds open for writing, on a filesystem with a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldFile {
    /// Its path as the process sees it.
    pub path: String,
    /// The device it is on.
    pub device: DevNum,
}

/// The regular files that a process holds open for writing. Sockets, pipes and what lives in memory
/// (device major 0: tmpfs, proc, overlay) are left out. This is where a daemon truly writes, whatever
/// has been mounted over its directories since.
pub fn held_files(pid: u32) -> Result<Vec<HeldFile>> {
    let dir = format!("/proc/{pid}/fd");
    let doing = || format!("listing the open files of process {pid}");
    let mut held = Vec::new();
    for entry in fs::read_dir(&dir).with_context(doing)? {
        let path = entry.with_context(doing)?.path();
        let number = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"));
        let (meta, info, target) = match (fs::metadata(&path), info, fs::read_link(&path)) {
            (Ok(meta), Ok(info), Ok(target)) => (meta, info, target),
            // Closed since it was listed.
            (Err(e), _, _) | (_, Err(e), _) | (_, _, Err(e)) if e.kind() == ErrorKind::NotFound => {
                continue;
            }
            (Err(e), _, _) | (_, Err(e), _) | (_, _, Err(e)) => return Err(e).with_context(doing),
        };
        let device = DevNum::of(meta.dev());
        if meta.is_file() && device.major != 0 && opened_for_writing(&info) {
            held.push(HeldFile { path: target.to_string_lossy().into_owned(), device });
        }
    }
    held.sort_by(|a, b| a.path.cmp(&b.path));
    held.dedup();
    Ok(held)
}

/// Reads the `flags:` line of an fdinfo file (proc(5): octal).
fn opened_for_writing(fdinfo: &str) -> bool {
    let flags = fdinfo.lines().find_map(|line| line.strip_prefix("flags:"));
    flags
        .and_then(|text| i64::from_str_radix(text.trim(), 8).ok())
        // What cannot be read counts as writing.
        .is_none_or(|flags| {
            flags & i64::from(nix::libc::O_ACCMODE) != i64::from(nix::libc::O_RDONLY)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[&str], dirs: &[&str]) -> tempfile::TempDir {
        let top = tempfile::tempdir().unwrap();
        for dir in dirs {
            fs::create_dir_all(top.path().join(dir)).unwrap();
        }
        for file in files {
            let path = top.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        top
    }

    #[test]
    fn a_daemon_that_only_ever_started_has_used_nothing() {
        let docker = tree(
            &[
                "engine-id",
                "buildkit/cache.db",
                "buildkit/metadata_v2.db",
                "image/overlay2/repositories.json",
                "network/files/local-kv.db",
                "volumes/metadata.db",
            ],
            &["containers", "overlay2/l", "image/overlay2/imagedb/content/sha256", "swarm", "tmp"],
        );
        assert_eq!(storage(docker.path()).unwrap(), Storage::Unused);
        let containerd = tree(
            &["io.containerd.metadata.v1.bolt/meta.db"],
            &["io.containerd.content.v1.content/ingest", "tmpmounts"],
        );
        assert_eq!(storage(containerd.path()).unwrap(), Storage::Unused);
        assert_eq!(storage(tree(&[], &[]).path()).unwrap(), Storage::Unused);
    }

    #[test]
    fn anything_of_a_users_is_seen() {
        for file in [
            "image/overlay2/imagedb/content/sha256/ab",
            "containers/ab/config.v2.json",
            "overlay2/ab/diff/etc/passwd",
            "volumes/v/_data/file",
            "io.containerd.content.v1.content/blobs/sha256/ab",
            "notes.txt",
            "deep/engine-id",
        ] {
            let top = tree(&["engine-id", file], &[]);
            assert!(matches!(storage(top.path()).unwrap(), Storage::Used(_)), "{file}");
        }
        let volume = tree(&["engine-id"], &["volumes/empty/_data"]);
        assert!(
            matches!(storage(volume.path()).unwrap(), Storage::Used(p) if p.ends_with("volumes/empty"))
        );
    }

    #[test]
    fn links_are_told_from_directories() {
        let top = tree(&["file"], &["dir"]);
        std::os::unix::fs::symlink("/data/docker", top.path().join("link")).unwrap();
        assert_eq!(
            storage(&top.path().join("link")).unwrap(),
            Storage::Symlink("/data/docker".into())
        );
        assert_eq!(storage(&top.path().join("file")).unwrap(), Storage::NotADirectory);
        assert_eq!(storage(&top.path().join("none")).unwrap(), Storage::Absent);
    }

    #[test]
    fn only_files_open_for_writing_count() {
        let top = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (written, read) = (top.path().join("written"), top.path().join("read"));
        fs::write(&read, "x").unwrap();
        let _writer = fs::File::create(&written).unwrap();
        let _reader = fs::File::open(&read).unwrap();
        let held = held_files(std::process::id()).unwrap();
        let device = DevNum::of(fs::metadata(&written).unwrap().dev());
        let is = |p: &Path| held.iter().any(|h| h.path == p.to_string_lossy());
        assert!(!is(&read));
        assert_eq!(is(&written), device.major != 0, "{held:?}");
        assert!(opened_for_writing("pos:\t0\nflags:\t0100002\n"));
        assert!(!opened_for_writing("pos:\t0\nflags:\t0100000\n"));
        assert!(opened_for_writing("nothing"), "what cannot be read is not harmless");
    }
}
