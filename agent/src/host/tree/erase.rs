//! Removes a tree, and first overwrites what its files hold: on a disk that is not encrypted, what
//! is only unlinked can still be read.

use std::ffi::CStr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{self, AtFlags, FileType, OFlags, SeekFrom, fstat, statat};
use rustix::io::Errno;

use super::copy::{next_data, retry};
use super::node::{self, kind};
use super::walk::{Visit, Walk};
use super::{CHUNK, Progress};

/// How often a directory is listed again that was not empty after everything in it was removed.
const PASSES: u32 = 100;

/// Overwrites every file of the tree `name` in `parent` with zeros, flushes that, and removes the
/// tree. A file that has a link outside of the tree belongs to somebody else too: only its links in
/// the tree are removed. What was interrupted is done by doing it again.
///
/// Names, targets of links and extended attributes are removed, not overwritten.
pub fn erase(parent: BorrowedFd<'_>, name: &CStr, progress: &Progress) -> Result<()> {
    let Some(top) = open_top(parent, name)? else { return Ok(()) };
    let usage = super::measure(top, progress)?;
    let top = super::open_dir(parent, name).context("opening the tree")?;
    progress.begin("overwriting", usage.bytes)?;
    let zeros = vec![0; CHUNK];
    let mut walk = Walk::new(top)?;
    node::unlock(walk.fd()?).with_context(|| walk.shown())?;
    while let Some(visit) = walk.next()? {
        progress.tick()?;
        let Visit::Entry(name, stat) = visit else { continue };
        let doing = || format!("overwriting {}", walk.shown());
        match kind(&stat) {
            FileType::Directory => {
                walk.enter(&name, &stat)?;
                node::unlock(walk.fd()?).with_context(|| walk.shown())?;
            }
            // One with several links is overwritten when its last link goes.
            FileType::RegularFile if stat.st_nlink == 1 => {
                let file = open_changeable(walk.fd()?, &name).with_context(doing)?;
                overwrite(file.as_fd(), &zeros, progress).with_context(doing)?;
            }
            _ => {}
        }
    }
    fs::syncfs(parent).context("flushing what was overwritten")?;
    progress.begin("removing", 0)?;
    remove_tree(parent, name, Some(&zeros), progress)
}

/// Removes the tree `name` in `parent`; absence is fine. Its blocks are left as they are.
pub fn remove(parent: BorrowedFd<'_>, name: &CStr, progress: &Progress) -> Result<()> {
    remove_tree(parent, name, None, progress)
}

/// The top of a tree, none if there is none. What is no directory is an error.
fn open_top(parent: BorrowedFd<'_>, name: &CStr) -> Result<Option<OwnedFd>> {
    match super::open_dir(parent, name) {
        Ok(top) => Ok(Some(top)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("opening {}", node::shown(name.to_bytes()))),
    }
}

fn remove_tree(
    parent: BorrowedFd<'_>,
    top_name: &CStr,
    zeros: Option<&[u8]>,
    progress: &Progress,
) -> Result<()> {
    let Some(top) = open_top(parent, top_name)? else { return Ok(()) };
    let mut walk = Walk::new(top)?;
    node::unlock(walk.fd()?).with_context(|| walk.shown())?;
    let mut passes = 0;
    while let Some(visit) = walk.next()? {
        progress.tick()?;
        let doing = || format!("removing {}", walk.shown());
        match visit {
            Visit::Entry(name, stat) if kind(&stat) == FileType::Directory => {
                walk.enter(&name, &stat)?;
                node::unlock(walk.fd()?).with_context(|| walk.shown())?;
            }
            Visit::Entry(name, stat) => {
                let dir = walk.fd()?;
                if kind(&stat) == FileType::RegularFile {
                    last_link(dir, &name, zeros, progress).with_context(doing)?;
                }
                fs::unlinkat(dir, &*name, AtFlags::empty()).with_context(doing)?;
            }
            Visit::Leave => {
                let (dir, name) = walk.parent()?.unwrap_or((parent, top_name));
                match fs::unlinkat(dir, name, AtFlags::REMOVEDIR) {
                    Ok(()) => {}
                    // A list that is read while its entries go may leave some out.
                    Err(Errno::NOTEMPTY | Errno::EXIST) => {
                        passes += 1;
                        ensure!(passes < PASSES, "{}: something makes new files there", doing());
                        walk.again();
                    }
                    Err(e) => return Err(e).with_context(doing),
                }
            }
        }
    }
    fs::fsync(parent).context("flushing the directory above")
}

/// Prepares a file to be unlinked: makes it changeable, and overwrites it if it has several links and
/// this is the last.
fn last_link(
    dir: BorrowedFd<'_>,
    name: &CStr,
    zeros: Option<&[u8]>,
    progress: &Progress,
) -> Result<()> {
    let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let Some(zeros) = zeros else {
        // Opened only to look at its attributes.
        return node::unlock(node::open(dir, name, OFlags::RDONLY)?.as_fd());
    };
    let file = node::open(dir, name, OFlags::RDONLY)?;
    node::unlock(file.as_fd())?;
    if stat.st_nlink == 1 && next_data(file.as_fd(), 0)?.is_some() {
        let file = open_changeable(dir, name)?;
        if overwrite(file.as_fd(), zeros, progress)? {
            fs::fdatasync(&file).context("flushing it")?;
        }
    }
    Ok(())
}

fn open_changeable(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
    match node::open(dir, name, OFlags::RDWR) {
        Err(Errno::PERM) => {
            node::unlock(node::open(dir, name, OFlags::RDONLY)?.as_fd())?;
            Ok(node::open(dir, name, OFlags::RDWR)?)
        }
        result => Ok(result?),
    }
}

/// Overwrites the data of a file in place; its holes stay. Says whether anything was written: data
/// that is zeros already is not.
fn overwrite(file: BorrowedFd<'_>, zeros: &[u8], progress: &Progress) -> Result<bool> {
    let size = u64::try_from(fstat(file)?.st_size)?;
    let mut buffer = vec![0; zeros.len()];
    let (mut at, mut wrote) = (0, false);
    while let Some(data) = next_data(file, at)?.filter(|data| *data < size) {
        at = data;
        let end = fs::seek(file, SeekFrom::Hole(at)).context("looking for holes")?.min(size);
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(CHUNK).min(zeros.len());
            let read = retry(rustix::io::pread(file, &mut buffer[..wanted], at))?;
            let Some(read) = read else { continue };
            ensure!(read > 0, "it became shorter meanwhile");
            let mut length = read;
            if buffer[..read] != zeros[..read] {
                let written = retry(rustix::io::pwrite(file, &zeros[..read], at))?;
                let Some(written) = written else { continue };
                (length, wrote) = (written, true);
            }
            at += length as u64;
            progress.add(length)?;
        }
    }
    Ok(wrote)
}
