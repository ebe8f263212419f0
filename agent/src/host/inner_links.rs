//! Symbolic links inside of a storage directory of Docker's, where the daemons keep directories, as
//! people make them who are short of space (`/var/lib/docker/overlay2 -> /srv/overlay2`): what is
//! written behind one is where it leads, whatever the storage directory is on.
//!
//! Looked for where somebody may have put one, and not in layers or in what volumes hold: these have
//! links of their own, which mean nothing to the daemons. It has to be quick: the gate waits for it.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::block::DevNum;
use super::docker::is_circle;

/// A symbolic link inside of a storage directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InnerLink {
    /// Where it is.
    pub path: PathBuf,
    /// What is written in it.
    pub target: PathBuf,
    /// Where it leads in truth, and the device there; none if it leads nowhere.
    pub leads: Option<(PathBuf, DevNum)>,
}

/// The links in a storage directory of Docker's or containerd's: at its top, in that of remapped users,
/// among the volumes, and in containerd's directories. Of a directory that is not there, none.
pub fn inner_links(top: &Path) -> Result<Vec<InnerLink>> {
    let mut found = Vec::new();
    look_in(top, &mut found)?;
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Whether this is the name of the directory that Docker has for remapped users, such as
/// `100000.100000`.
#[must_use]
pub fn is_remapped(name: &str) -> bool {
    name.split_once('.').is_some_and(|(user, group)| {
        [user, group].iter().all(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    })
}

fn look_in(top: &Path, found: &mut Vec<InnerLink>) -> Result<()> {
    for directory in list(top, found)? {
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name == "volumes" {
            for volume in list(&directory, found)? {
                found.extend(link(volume.join("_data"))?);
            }
        } else if name.starts_with("io.containerd.") {
            list(&directory, found)?;
        } else if is_remapped(&name) || name == "containerd" || name == "daemon" {
            // The last two: a containerd that dockerd started itself has its root in them.
            look_in(&directory, found)?;
        }
    }
    Ok(())
}

/// The directories in a directory; the links in it are found.
fn list(directory: &Path, found: &mut Vec<InnerLink>) -> Result<Vec<PathBuf>> {
    let doing = || format!("listing {}", directory.display());
    let mut directories = Vec::new();
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        // Not there, or removed since its name was read; what is no directory has no links in it.
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(directories);
        }
        Err(e) => return Err(e).with_context(doing),
    };
    for entry in entries {
        let entry = entry.with_context(doing)?;
        match entry.file_type() {
            Ok(kind) if kind.is_symlink() => found.extend(link(entry.path())?),
            Ok(kind) if kind.is_dir() => directories.push(entry.path()),
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(doing),
        }
    }
    Ok(directories)
}

/// The link at a path, if there is one.
fn link(path: PathBuf) -> Result<Option<InnerLink>> {
    let doing = || format!("looking at {}", path.display());
    let target = match fs::read_link(&path) {
        Ok(target) => target,
        Err(e) => match e.kind() {
            ErrorKind::NotFound | ErrorKind::InvalidInput | ErrorKind::NotADirectory => {
                return Ok(None);
            }
            _ => return Err(e).with_context(doing),
        },
    };
    let truth = fs::canonicalize(&path).and_then(|real| {
        let meta = fs::metadata(&real)?;
        Ok((real, DevNum::of(meta.dev())))
    });
    let leads = match truth {
        Ok(truth) => Some(truth),
        Err(e)
            if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
                || is_circle(&e) =>
        {
            None
        }
        Err(e) => return Err(e).with_context(doing),
    };
    Ok(Some(InnerLink { path, target, leads }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_found_where_the_daemons_keep_directories() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().canonicalize().unwrap();
        let top = outside.join("docker");
        let at = |path: &str| {
            let path = top.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            path
        };
        fs::create_dir(outside.join("srv")).unwrap();
        let there = [
            "overlay2",
            "volumes/linked",
            "volumes/v/_data",
            "100000.100000/overlay2",
            "100000.100000/volumes/v/_data",
            "containerd/daemon/io.containerd.content.v1.content/blobs",
            "io.containerd.content.v1.content",
            "io.containerd.snapshotter.v1.overlayfs/snapshots",
        ];
        for path in there {
            symlink(outside.join("srv"), at(path)).unwrap();
        }
        // What layers and volumes hold, and Docker's own short names of layers.
        for path in ["volumes/other/_data/link", "vfs/dir/link", "image/overlay2/deep/l"] {
            symlink("/nowhere", at(path)).unwrap();
        }
        fs::write(at("engine-id"), "x").unwrap();
        let device = DevNum::of(fs::metadata(&outside).unwrap().dev());
        let found = inner_links(&top).unwrap();
        let paths: Vec<_> = found.iter().map(|link| link.path.clone()).collect();
        let mut expected = there.map(|path| top.join(path)).to_vec();
        expected.sort();
        assert_eq!(paths, expected);
        assert!(found.iter().all(|link| link.leads == Some((outside.join("srv"), device))));

        let only = |target: &str| {
            let top = tempfile::tempdir().unwrap();
            symlink(target, top.path().join("link")).unwrap();
            let found = inner_links(top.path()).unwrap();
            assert_eq!(found[0].target, Path::new(target));
            found[0].leads.clone()
        };
        for nowhere in ["/no/such/place", "link", "/proc/self/status/x"] {
            assert_eq!(only(nowhere), None, "{nowhere}");
        }
        assert_eq!(inner_links(&outside.join("none")).unwrap(), []);
    }
}
