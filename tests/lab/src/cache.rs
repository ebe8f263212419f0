//! Things that take long to make and are the same until what they depend on changes: the guest
//! image, snapshots, the Python environment, tools. Each lies under a key, the hash of everything
//! it was made from. It is made in a temporary sibling and renamed when complete, so a build that
//! was killed leaves nothing that looks finished.

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// How many entries of a kind are kept besides the newest.
const KEEP: usize = 2;

/// The root of the repository.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap_or_default()
}

/// The lab's directory for everything that can be made again.
pub fn root() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    let root = base.join("hostagent");
    fs::create_dir_all(&root).with_context(|| format!("creating {}", root.display()))?;
    Ok(root)
}

/// Collects what a thing depends on.
#[derive(Clone, Default)]
pub struct Key(Sha256);

impl Key {
    /// An empty key.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one dependency. Its length is hashed too, so that neighbours cannot run together.
    pub fn with(mut self, part: impl AsRef<[u8]>) -> Self {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    /// Adds the content of a file.
    pub fn with_file(self, path: &Path) -> Result<Self> {
        let content = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        Ok(self.with(content))
    }

    /// Adds every file below a directory, with its name and whether it may be executed.
    pub fn with_tree(mut self, dir: &Path) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let mut entries = fs::read_dir(dir)
            .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
            .with_context(|| format!("listing {}", dir.display()))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            self = self.with(entry.file_name().to_string_lossy().as_bytes());
            if path.is_dir() {
                self = self.with_tree(&path)?;
            } else {
                let executable = path.metadata()?.permissions().mode() & 0o100 != 0;
                self = self.with([u8::from(executable)]).with_file(&path)?;
            }
        }
        Ok(self)
    }

    /// The key as a directory name.
    pub fn name(&self) -> String {
        self.0.clone().finalize().iter().take(8).fold(String::new(), |mut name, byte| {
            use std::fmt::Write as _;
            let _ = write!(name, "{byte:02x}");
            name
        })
    }
}

/// Returns the directory `kind/key`, made by `make` if it does not exist. `make` gets the temporary
/// directory to fill. Only one process makes something of a kind at a time; the others wait.
pub fn entry(kind: &str, key: &Key, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let dir = root()?.join(kind);
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let entry = dir.join(key.name());
    if entry.is_dir() {
        touch(&entry);
        return Ok(entry);
    }
    let _lock = lock(&dir.join(".lock"), &format!("another run that makes {kind}"))?;
    if entry.is_dir() {
        return Ok(entry);
    }
    let unfinished = dir.join(format!(".{}.unfinished", key.name()));
    remove(&unfinished)?;
    fs::create_dir(&unfinished).with_context(|| format!("creating {}", unfinished.display()))?;
    make(&unfinished)?;
    fs::rename(&unfinished, &entry)
        .with_context(|| format!("renaming {} to {}", unfinished.display(), entry.display()))?;
    prune(&dir, &entry);
    Ok(entry)
}

/// Takes a lock that ends with the process; says whom it waits for when that takes time.
pub fn lock(path: &Path, holder: &str) -> Result<File> {
    let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
    if file.try_lock().is_err() {
        crate::progress::say(format!("waiting for {holder} ({})", path.display()));
        file.lock().with_context(|| format!("locking {}", path.display()))?;
    }
    Ok(file)
}

/// Copies a disk image: shares the blocks where the file system can, and keeps holes.
pub fn copy_disk(from: &Path, to: &Path) -> Result<()> {
    crate::command::run(
        std::process::Command::new("cp")
            .args(["--reflink=auto", "--sparse=always", "--"])
            .args([from, to]),
    )
    .with_context(|| format!("copying the disk {}", from.display()))
    .map(drop)
}

/// Removes a directory tree if it exists.
fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Marks an entry as used now. Only the order of pruning depends on it.
fn touch(entry: &Path) {
    if let Ok(dir) = File::open(entry) {
        let _ = dir.set_modified(std::time::SystemTime::now());
    }
}

/// Removes entries that were not used lately, and what killed builds left. Failing to is no error:
/// the next run tries again.
fn prune(dir: &Path, newest: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut others = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        if hidden && path.is_dir() {
            let _ = fs::remove_dir_all(&path);
        } else if !hidden && path != newest {
            let used = entry.metadata().and_then(|data| data.modified());
            others.push((used.unwrap_or(std::time::UNIX_EPOCH), path));
        }
    }
    others.sort();
    let surplus = others.len().saturating_sub(KEEP);
    for (_, path) in &others[..surplus] {
        let _ = fs::remove_dir_all(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_do_not_run_together() {
        assert_ne!(Key::new().with("ab").with("c").name(), Key::new().with("a").with("bc").name());
    }

    #[test]
    fn old_entries_and_unfinished_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        for (age, name) in ["a", "b", "c", "d", ".x.unfinished"].iter().enumerate() {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            let then = std::time::SystemTime::now() - std::time::Duration::from_secs(age as u64);
            File::open(&path).unwrap().set_modified(then).unwrap();
        }
        prune(dir.path(), &dir.path().join("d"));
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["a", "b", "d"]);
    }
}
