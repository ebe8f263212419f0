//! What of a tree was changed since a moment, told by the times at which the kernel last changed
//! anything of a file (`st_ctime`, inode(7)), which nobody can set.

use std::fmt;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{FileType, Mode, Stat, fchmod, fstat};

use super::Progress;
use super::node::{self, kind};
use super::walk::{Visit, Walk};

/// How often the time is asked for until it moves. Filesystems keep it by the second at worst, the
/// kernel's clock for it moves every 10 ms at worst.
const TRIES: u32 = 5000;

/// A moment by the clock that dates changes of files: seconds since 1970, and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(i64, u32);

impl Time {
    fn of_change(stat: &Stat) -> Self {
        Self(stat.st_ctime, node::narrow(stat.st_ctime_nsec))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:09}", self.0, self.1)
    }
}

impl FromStr for Time {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (seconds, nanoseconds) = text.split_once('.').context("not a time")?;
        Ok(Self(seconds.parse()?, nanoseconds.parse()?))
    }
}

/// The time, as the filesystem of an opened directory dates changes: whatever was changed before this
/// began has an earlier date, whatever is changed after it has this one or a later one. That clock is
/// coarser than the one that programs read, and behind it, so it is read off a change that is none: the
/// directory is given the mode that it has.
pub fn now(dir: BorrowedFd<'_>) -> Result<Time> {
    let mut first = None;
    for _ in 0..TRIES {
        let mode = fstat(dir).context("looking at the top of a tree")?.st_mode;
        fchmod(dir, Mode::from_raw_mode(mode & 0o7777)).context("asking for the time of files")?;
        let now = Time::of_change(&fstat(dir).context("looking at the top of a tree")?);
        if now > *first.get_or_insert(now) {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    bail!("the clock that dates changes of files stands still")
}

/// The first path of a tree, for people, that was changed at a time or later; the top itself does not
/// count. Told by dates alone: no file is opened. An error if the clock is behind that time.
pub fn changed_since(top: OwnedFd, time: Time, progress: &Progress) -> Result<Option<String>> {
    let today = now(top.as_fd())?;
    ensure!(
        today >= time,
        "the clock was set back, from {time} to {today}, and dates tell nothing"
    );
    let mut directory = None;
    let mut walk = Walk::new(top)?;
    while let Some(visit) = walk.next()? {
        let Visit::Entry(name, stat) = visit else { continue };
        progress.tick()?;
        let is_changed = Time::of_change(&stat) >= time;
        if kind(&stat) == FileType::Directory {
            if is_changed {
                // What is new in it says more.
                directory.get_or_insert_with(|| walk.shown());
            }
            walk.enter(&name, &stat)?;
        } else if is_changed {
            return Ok(Some(walk.shown()));
        }
    }
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File, Permissions};
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::path::Path;

    fn open(path: &Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    /// A tree, and the time after it was made.
    fn tree() -> (tempfile::TempDir, Time) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("a/b/file"), "x").unwrap();
        fs::write(dir.path().join("a/b/other"), "y").unwrap();
        symlink("b", dir.path().join("a/link")).unwrap();
        let time = now(open(dir.path()).as_fd()).unwrap();
        (dir, time)
    }

    fn changed(dir: &Path, time: Time) -> Option<String> {
        changed_since(open(dir), time, &Progress::default()).unwrap()
    }

    #[test]
    fn every_change_after_a_moment_is_seen_and_none_before_it() {
        type Change = fn(&Path);
        let changes: [(&str, Change); 8] = [
            ("a/b/file", |p| fs::write(p.join("a/b/file"), "z").unwrap()),
            // With the old time of modification and size: the date of the change tells.
            ("a/b/file", |p| {
                let times = fs::metadata(p.join("a/b/file")).unwrap().modified().unwrap();
                fs::write(p.join("a/b/file"), "z").unwrap();
                File::open(p.join("a/b/file")).unwrap().set_modified(times).unwrap();
            }),
            ("a/b/file", |p| {
                fs::set_permissions(p.join("a/b/file"), Permissions::from_mode(0o600)).unwrap();
            }),
            ("a/b", |p| fs::remove_file(p.join("a/b/other")).unwrap()),
            ("a/b/new", |p| fs::write(p.join("a/b/new"), "n").unwrap()),
            ("new", |p| fs::write(p.join("new"), "n").unwrap()),
            ("a", |p| fs::remove_file(p.join("a/link")).unwrap()),
            ("moved", |p| fs::rename(p.join("a/b/file"), p.join("moved")).unwrap()),
        ];
        for (i, (path, change)) in changes.into_iter().enumerate() {
            let (dir, time) = tree();
            assert_eq!(changed(dir.path(), time), None, "case {i}");
            change(dir.path());
            assert_eq!(changed(dir.path(), time).as_deref(), Some(path), "case {i}");
            // Long since.
            let later = now(open(dir.path()).as_fd()).unwrap();
            assert_eq!(changed(dir.path(), later), None, "case {i}");
        }
    }

    #[test]
    fn what_is_only_read_or_renamed_as_a_whole_is_not_changed() {
        let (dir, time) = tree();
        let mode = fs::metadata(dir.path()).unwrap().mode();
        fs::read(dir.path().join("a/b/file")).unwrap();
        let renamed = dir.path().with_extension("renamed");
        fs::rename(dir.path(), &renamed).unwrap();
        assert_eq!(changed(&renamed, time), None);
        let future = Time(time.0 + 3600, 0);
        let error = changed_since(open(&renamed), future, &Progress::default()).unwrap_err();
        assert!(error.to_string().contains("set back"), "{error}");
        fs::rename(&renamed, dir.path()).unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().mode(), mode);
    }

    #[test]
    fn a_time_is_written_and_read() {
        let time = Time(1_795_365_000, 7);
        assert_eq!(time.to_string(), "1795365000.000000007");
        assert_eq!(time.to_string().parse::<Time>().unwrap(), time);
        assert!(Time(2, 0) > Time(1, 999_999_999));
        for bad in ["", "erasing", "1", "1.x"] {
            assert!(bad.parse::<Time>().is_err(), "{bad}");
        }
    }
}
