//! Files and directories: reading where absence is an answer, replacing atomically and durably.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use rustix::fs::IFlags;

/// The content of a text file; none if there is no such file.
pub fn read_optional(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

/// The content of a file in whatever encoding; none if there is no such file.
pub fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

/// Replaces a file so that, whenever the power fails, either the old content or the new is there.
/// Missing parent directories are made (mode 0755). One writer at a time.
pub fn write_atomic(path: &Path, content: &str, mode: u32) -> Result<()> {
    replace(path, content.as_bytes(), mode, None)
}

/// Replaces a file of somebody else's as [`write_atomic`] does. Its mode and owner stay, and a link
/// that leads to it.
pub fn rewrite(path: &Path, content: &[u8]) -> Result<()> {
    let path = fs::canonicalize(path).with_context(|| format!("looking for {}", path.display()))?;
    like(&path, &path, content)
}

/// Writes `copy` with the mode and the owner that the file at `path` has.
pub fn copy_beside(path: &Path, copy: &Path, content: &[u8]) -> Result<()> {
    like(path, copy, content)
}

fn like(model: &Path, path: &Path, content: &[u8]) -> Result<()> {
    let meta = fs::metadata(model).with_context(|| format!("looking at {}", model.display()))?;
    replace(path, content, meta.mode() & 0o7777, Some((meta.uid(), meta.gid())))
}

fn replace(path: &Path, content: &[u8], mode: u32, owner: Option<(u32, u32)>) -> Result<()> {
    let doing = || format!("writing {}", path.display());
    let dir = path.parent().with_context(doing)?;
    make_directories(dir, 0o755)?;
    // Always the same name: what a power cut left of an earlier attempt does not pile up.
    let mut name = OsString::from(".hostagent-");
    name.push(path.file_name().with_context(doing)?);
    remove(&dir.join(&name))?;
    let mut file = tempfile::Builder::new()
        .prefix(&name)
        .rand_bytes(0)
        .tempfile_in(dir)
        .with_context(doing)?;
    file.write_all(content).with_context(doing)?;
    // Before the mode, whose special bits it would clear.
    if let Some((uid, gid)) = owner {
        std::os::unix::fs::fchown(file.as_file(), Some(uid), Some(gid)).with_context(doing)?;
    }
    file.as_file().set_permissions(fs::Permissions::from_mode(mode)).with_context(doing)?;
    file.as_file().sync_all().with_context(doing)?;
    file.persist(path).with_context(doing)?;
    sync_dir(dir)
}

/// Makes a directory and those above it that are missing, with `mode`, durably.
pub fn make_directories(dir: &Path, mode: u32) -> Result<()> {
    let doing = || format!("making the directory {}", dir.display());
    match fs::metadata(dir) {
        Ok(meta) if meta.is_dir() => return Ok(()),
        Ok(_) => bail!("{} is not a directory", dir.display()),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e).with_context(doing),
    }
    let parent = dir.parent().with_context(doing)?;
    // A name relative to the current directory has an empty parent.
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    make_directories(parent, mode)?;
    match fs::DirBuilder::new().mode(mode).create(dir) {
        Ok(()) => sync_dir(parent),
        Err(e) if e.kind() == ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(e) => Err(e).with_context(doing),
    }
}

/// Removes a file durably; absence is fine.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir(path.parent().unwrap_or(Path::new("/"))),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).with_context(|| format!("removing {}", path.display())),
    }
}

/// Makes durable which names a directory has.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .with_context(|| format!("syncing the directory {}", dir.display()))
}

/// What is at a path where a mount point should be.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Nothing.
    Absent,
    /// A symbolic link, to this target.
    Symlink(String),
    /// Something that is neither directory nor link.
    NotADirectory,
    /// An empty directory.
    Empty {
        /// Whether it is immutable (chattr(1) `+i`), so that nothing can be written into it.
        immutable: bool,
    },
    /// A directory that holds this many entries.
    Occupied(usize),
}

/// Looks at what is at `path`, without following a link there.
pub fn place(path: &Path) -> Result<Place> {
    let doing = || format!("looking at {}", path.display());
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Place::Absent),
        Err(e) => return Err(e).with_context(doing),
    };
    if meta.is_symlink() {
        let target = fs::read_link(path).with_context(doing)?;
        return Ok(Place::Symlink(target.display().to_string()));
    }
    if !meta.is_dir() {
        return Ok(Place::NotADirectory);
    }
    let mut entries = 0;
    for entry in fs::read_dir(path).with_context(doing)? {
        entry.with_context(doing)?;
        entries += 1;
    }
    if entries > 0 {
        return Ok(Place::Occupied(entries));
    }
    let dir = File::open(path).with_context(doing)?;
    // A filesystem without these flags (tmpfs, overlay) has no immutable directories.
    let immutable = rustix::fs::ioctl_getflags(&dir).is_ok_and(|f| f.contains(IFlags::IMMUTABLE));
    Ok(Place::Empty { immutable })
}

/// Makes `path` an empty directory in which nothing can be created: the place under a mount.
/// Refuses what is not an empty directory or absent.
pub fn prepare_mount_point(path: &Path) -> Result<()> {
    match place(path)? {
        Place::Absent => make_directories(path, 0o755)?,
        Place::Empty { immutable: true } => return Ok(()),
        Place::Empty { immutable: false } => {}
        other => bail!("{} is not an empty directory: {other:?}", path.display()),
    }
    // O_NOFOLLOW: the directory itself, not what a link put there meanwhile points to.
    let dir = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_DIRECTORY)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))?;
    let flags = rustix::fs::ioctl_getflags(&dir)
        .with_context(|| format!("reading the attributes of {}", path.display()))?;
    rustix::fs::ioctl_setflags(&dir, flags | IFlags::IMMUTABLE)
        .with_context(|| format!("making {} immutable", path.display()))?;
    dir.sync_all().with_context(|| format!("syncing the directory {}", path.display()))?;
    // Between the look and the flag something may have been put there.
    match place(path)? {
        Place::Empty { immutable: true } => Ok(()),
        other => bail!("{} did not stay an empty directory: {other:?}", path.display()),
    }
}

/// Makes one directory with `mode`, on the filesystem of its parent, which must have the device
/// number `device`. Not its parents: a parent that is missing is a mount that is missing.
pub fn make_directory_on(path: &Path, mode: u32, device: super::block::DevNum) -> Result<()> {
    let doing = || format!("making the directory {}", path.display());
    let parent = path.parent().with_context(doing)?;
    let seen = fs::metadata(parent).with_context(doing)?.dev();
    if seen != device.raw() {
        bail!("{} is not on the data volume (device {device})", parent.display());
    }
    match fs::DirBuilder::new().mode(mode).create(path) {
        Ok(()) => sync_dir(parent),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            let meta = fs::symlink_metadata(path).with_context(doing)?;
            if meta.is_dir() && meta.dev() == device.raw() {
                Ok(())
            } else {
                bail!("{} exists, and is not a directory on the data volume", path.display())
            }
        }
        Err(e) => Err(e).with_context(doing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_with_its_mode_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/f.conf");
        write_atomic(&path, "one", 0o600).unwrap();
        // What a power cut can leave of an attempt.
        fs::write(dir.path().join("new/.hostagent-f.conf"), "half").unwrap();
        write_atomic(&path, "two", 0o644).unwrap();
        assert_eq!(read_optional(&path).unwrap().as_deref(), Some("two"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o644);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(read_optional(&path).unwrap(), None);
    }

    #[test]
    fn somebody_elses_file_keeps_its_mode_and_the_link_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("f"), dir.path().join("link"));
        fs::write(&file, "one").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("f", &link).unwrap();
        rewrite(&link, b"two").unwrap();
        copy_beside(&link, &dir.path().join("f.old"), b"one").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        for (name, content) in [("f", "two"), ("f.old", "one")] {
            let path = dir.path().join(name);
            assert_eq!(read_bytes(&path).unwrap().as_deref(), Some(content.as_bytes()));
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        }
        assert!(rewrite(&dir.path().join("none"), b"x").is_err(), "what is gone is not made anew");
        assert_eq!(read_bytes(&dir.path().join("none")).unwrap(), None);
        assert!(read_bytes(dir.path()).is_err());
    }

    #[test]
    fn an_unreadable_file_is_not_an_absent_one() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read_optional(dir.path()).is_err());
        assert!(read_optional(&dir.path().join("none")).unwrap().is_none());
    }

    #[test]
    fn places_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("empty")).unwrap();
        fs::create_dir_all(at("full/x")).unwrap();
        fs::write(at("file"), "").unwrap();
        std::os::unix::fs::symlink("empty", at("link")).unwrap();
        assert_eq!(place(&at("none")).unwrap(), Place::Absent);
        assert_eq!(place(&at("empty")).unwrap(), Place::Empty { immutable: false });
        assert_eq!(place(&at("full")).unwrap(), Place::Occupied(1));
        assert_eq!(place(&at("file")).unwrap(), Place::NotADirectory);
        assert_eq!(place(&at("link")).unwrap(), Place::Symlink("empty".into()));
        for name in ["full", "file", "link"] {
            assert!(prepare_mount_point(&at(name)).is_err(), "{name}");
        }
    }

    #[test]
    fn a_directory_is_made_only_on_the_right_device() {
        let dir = tempfile::tempdir().unwrap();
        let here = super::super::block::DevNum::of(fs::metadata(dir.path()).unwrap().dev());
        let path = dir.path().join("docker");
        let elsewhere = super::super::block::DevNum { major: 4095, minor: 1 };
        assert!(make_directory_on(&path, 0o710, elsewhere).is_err());
        assert!(!path.exists());
        make_directory_on(&path, 0o710, here).unwrap();
        make_directory_on(&path, 0o710, here).unwrap();
        assert!(make_directory_on(&dir.path().join("a/b"), 0o710, here).is_err(), "no parents");
    }
}
