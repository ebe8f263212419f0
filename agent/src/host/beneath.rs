//! What lies beneath mounts, on the filesystem that they hide.
//!
//! Looked at through a copy of the mount above, which shows that filesystem without anything that is
//! mounted on it (open_tree(2)). The copy is attached nowhere: nobody else sees it, nothing is
//! disturbed, and it is gone when its descriptor is closed. It takes `CAP_SYS_ADMIN`.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, IFlags, Mode, OFlags, fsync, ioctl_getflags, ioctl_setflags,
    openat, statat,
};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use serde::{Deserialize, Serialize};

use super::tree::{self, Progress, Usage};

/// Something that a mount hides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hidden {
    /// One path of it, as it would be seen without the mount.
    pub path: String,
    /// How much there is in all.
    pub usage: Usage,
}

/// The directory that `path` is in, without what is mounted there; and the name of `path` in it.
pub fn parent(path: &Path) -> Result<(OwnedFd, CString)> {
    let doing = || format!("looking beneath what is mounted on {}", path.display());
    let above = path.parent().with_context(doing)?;
    let name = path.file_name().with_context(doing)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let view = open_tree(CWD, above, flags).with_context(doing)?;
    // What open_tree gives is only a place: it cannot be read. This can, and keeps the copy.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let view = openat(&view, ".", flags, Mode::empty()).with_context(doing)?;
    Ok((view, CString::new(name.as_bytes()).with_context(doing)?))
}

/// A path under which this process can use something in an opened directory.
#[must_use]
pub fn through(dir: BorrowedFd<'_>, name: &std::ffi::CStr) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()))
        .join(OsStr::from_bytes(name.to_bytes()))
}

/// What a mount on `path` hides, if it hides anything but an empty directory.
pub fn hidden(path: &Path) -> Result<Option<Hidden>> {
    let doing = || format!("looking beneath what is mounted on {}", path.display());
    let (view, name) = parent(path)?;
    let stat = match statat(&view, &*name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(None),
        Err(e) => return Err(e).with_context(doing),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        let usage = Usage { bytes: 0, inodes: 1 };
        return Ok(Some(Hidden { path: path.display().to_string(), usage }));
    }
    let top = tree::open_dir(view.as_fd(), &name).with_context(doing)?;
    let mut entries = Dir::read_from(&top).with_context(doing)?;
    while let Some(entry) = entries.read() {
        let entry = entry.with_context(doing)?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            let first = path.join(OsStr::from_bytes(name));
            return of(top, &first).map(Some);
        }
    }
    Ok(None)
}

/// Whether the directory beneath a mount on `path` is immutable (chattr(1) `+i`), so that nothing can
/// be written there while the mount is absent. Not having been able to look is an error, and so is
/// that there is no directory.
pub fn is_immutable(path: &Path) -> Result<bool> {
    let dir = directory(path)?;
    match ioctl_getflags(&dir) {
        Ok(flags) => Ok(flags.contains(IFlags::IMMUTABLE)),
        // A filesystem without these flags (tmpfs, overlay) has no immutable directories.
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
        Err(e) => Err(e).with_context(|| {
            format!("asking whether the directory beneath {} is immutable", path.display())
        }),
    }
}

/// Makes the directory beneath a mount on `path` immutable, if it is empty.
pub fn make_immutable(path: &Path) -> Result<()> {
    let doing =
        || format!("making the directory beneath the mount on {} immutable", path.display());
    let empty = || match hidden(path)? {
        None => Ok(()),
        Some(found) => Err(anyhow::anyhow!("it holds {}", found.path)),
    };
    empty().with_context(doing)?;
    let dir = directory(path)?;
    let flags = ioctl_getflags(&dir).with_context(doing)?;
    ioctl_setflags(&dir, flags | IFlags::IMMUTABLE).with_context(doing)?;
    fsync(&dir).with_context(doing)?;
    ensure!(is_immutable(path)?, "the directory beneath {} did not stay immutable", path.display());
    // Between the look and the flag something may have been put there.
    empty().with_context(doing)
}

/// The directory beneath a mount on `path`, opened.
fn directory(path: &Path) -> Result<OwnedFd> {
    let (view, name) = parent(path)?;
    tree::open_dir(view.as_fd(), &name)
        .with_context(|| format!("opening the directory beneath the mount on {}", path.display()))
}

/// Measures what is hidden in an opened directory, of which one path is known.
pub fn of(top: OwnedFd, first: &Path) -> Result<Hidden> {
    let usage = tree::measure(top, &Progress::default())
        .with_context(|| format!("measuring what lies beneath the mount on {}", first.display()))?;
    Ok(Hidden { path: first.display().to_string(), usage })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_does_not_hide_what_lies_beneath() {
        let shm = Path::new("/dev/shm");
        let mounted = |path: &Path| {
            crate::host::mounts::all().unwrap().iter().any(|m| Path::new(&m.mount_point) == path)
        };
        if !mounted(shm) || !mounted(Path::new("/dev")) {
            eprintln!("skipped: /dev and /dev/shm are no mounts here");
            return;
        }
        let on_top = tempfile::NamedTempFile::new_in(shm).unwrap();
        let (view, name) = match parent(shm) {
            Ok(parent) => parent,
            // In a container that may not do this.
            Err(e) if e.downcast_ref() == Some(&Errno::PERM) => {
                eprintln!("skipped: open_tree is not permitted here");
                return;
            }
            Err(e) => panic!("{e:#}"),
        };
        let beneath = std::fs::read_dir(through(view.as_fd(), &name)).unwrap();
        let names: Vec<_> = beneath.map(|e| e.unwrap().file_name()).collect();
        assert!(!names.iter().any(|name| Some(&**name) == on_top.path().file_name()));
        let mut listed = Dir::read_from(&view).unwrap();
        assert!(listed.any(|entry| entry.unwrap().file_name() == c"shm"));
        // Not a mount at all: what is there is seen.
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        assert_eq!(hidden(&dir.path().join("data")).unwrap(), None);
        assert_eq!(hidden(&dir.path().join("none")).unwrap(), None);
        std::fs::write(dir.path().join("data/file"), "x").unwrap();
        let found = hidden(&dir.path().join("data")).unwrap().unwrap();
        assert_eq!(found.path, dir.path().join("data/file").display().to_string());
        assert_eq!(found.usage.inodes, 2);
    }

    /// Run in a mount namespace of its own: what is mounted there is seen by nobody else.
    #[test]
    fn the_directory_beneath_a_mount_is_told_and_made_immutable() {
        // Where the build is: /tmp may be memory, which has no such flag.
        let target = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(target.parent().unwrap()).unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let on_top = || -> rustix::io::Result<()> {
            use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
            #[expect(
                deprecated,
                reason = "its replacement is unsafe to call, and this use is sound"
            )]
            rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNS)?;
            mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
            mount("tmpfs", &data, "tmpfs", MountFlags::empty(), None)
        };
        // The namespace is this thread's alone, and gone with it.
        let seen = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    on_top()?;
                    std::fs::write(data.join("on-the-volume"), "x").unwrap();
                    let before = is_immutable(&data).unwrap();
                    let made = make_immutable(&data);
                    rustix::io::Result::Ok((before, made, is_immutable(&data).unwrap()))
                })
                .join()
                .unwrap()
        });
        match seen {
            Err(e) => eprintln!("skipped: nothing can be mounted here: {e}"),
            Ok((before, made, after)) => {
                assert!(!before);
                made.unwrap();
                assert!(after);
                assert!(
                    std::fs::write(data.join("file"), "x").is_err(),
                    "the directory itself is it"
                );
                let top = std::fs::File::open(&data).unwrap();
                ioctl_setflags(&top, IFlags::empty()).unwrap();
            }
        }
        // What holds something is left alone; and no directory is no answer.
        std::fs::write(data.join("file"), "x").unwrap();
        if parent(&data).is_ok() {
            assert!(format!("{:#}", make_immutable(&data).unwrap_err()).contains("data/file"));
            assert!(!is_immutable(&data).unwrap());
            assert!(is_immutable(&dir.path().join("none")).is_err());
        }
    }
}
