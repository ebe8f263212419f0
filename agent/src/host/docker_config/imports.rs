//! containerd's configuration file with those that it imports, as containerd reads them (containerd,
//! cmd/containerd/server/config, `LoadConfig`): the file, then what it imports, then what that imports.
//! Of a value that several set, the last one counts.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::host::files;

/// How many files there may be. Each is read once.
const MOST: usize = 64;

/// One of the files.
#[derive(Debug)]
pub(super) struct File {
    /// Its path.
    pub(super) path: PathBuf,
    /// What it holds.
    pub(super) table: toml::Table,
}

/// The file and all that it imports, in containerd's order; nothing if there is no such file. A file
/// that is imported and cannot be read is an error: containerd goes on without what would follow it, or
/// does not start.
pub(super) fn read(path: &Path) -> Result<Vec<File>> {
    let mut found: Vec<File> = Vec::new();
    let (mut seen, mut pending) = (BTreeSet::new(), vec![path.to_path_buf()]);
    while !pending.is_empty() {
        let path = pending.remove(0);
        if !seen.insert(path.clone()) {
            continue;
        }
        ensure!(found.len() < MOST, "{} would be file number {}", path.display(), MOST + 1);
        let doing = || format!("reading {}", path.display());
        let Some(text) = files::read_optional(&path)? else {
            ensure!(found.is_empty(), "{} is imported, and is not there", path.display());
            return Ok(found);
        };
        let table: toml::Table = text.parse().with_context(doing)?;
        pending.extend(imports(&path, &table).with_context(doing)?);
        found.push(File { path, table });
    }
    Ok(found)
}

/// The files that a file imports.
fn imports(file: &Path, table: &toml::Table) -> Result<Vec<PathBuf>> {
    let Some(imports) = table.get("imports") else { return Ok(Vec::new()) };
    let patterns: Option<Vec<&str>> =
        imports.as_array().and_then(|all| all.iter().map(toml::Value::as_str).collect());
    let Some(patterns) = patterns else { bail!("imports is {imports}") };
    let mut found = Vec::new();
    for pattern in patterns {
        let beside = clean(&file.parent().unwrap_or(Path::new("/")).join(pattern));
        if !pattern.contains('*') {
            found.push(beside);
            continue;
        }
        found.extend(matches(&beside)?);
        // Before version 2 such a pattern begins where containerd was started, which is the root
        // directory. One file more that is read does no harm.
        found.extend(matches(&clean(&Path::new("/").join(pattern)))?);
    }
    Ok(found)
}

/// A path without `.` and `..`, by its words alone, as Go's `filepath.Clean` does it.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => _ = out.pop(),
            part => out.push(part),
        }
    }
    out
}

/// The files that match a pattern, sorted; none is no error.
fn matches(pattern: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![PathBuf::new()];
    for part in pattern.components() {
        let text = part.as_os_str().to_str().context("a pattern that is not UTF-8")?;
        if !text.contains(['*', '?', '[', '\\']) {
            for path in &mut found {
                path.push(part);
            }
            continue;
        }
        ensure!(!text.contains(['[', '\\']), "the pattern {} is not understood", pattern.display());
        let mut below = Vec::new();
        for directory in found {
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                    continue;
                }
                Err(e) => {
                    return Err(e).with_context(|| format!("listing {}", directory.display()));
                }
            };
            for entry in entries {
                let name = entry.with_context(|| format!("listing {}", directory.display()))?;
                let name = name.file_name();
                if is_match(text.as_bytes(), name.as_encoded_bytes()) {
                    below.push(directory.join(name));
                }
            }
        }
        below.sort();
        found = below;
    }
    // Only what is there matches, and behind the last pattern names may follow.
    found.retain(|path| path.symlink_metadata().is_ok());
    Ok(found)
}

/// Whether a name matches a pattern of `*` and `?`.
fn is_match(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.first(), name.first()) {
        (None, None) => true,
        (Some(b'*'), _) => {
            is_match(&pattern[1..], name) || !name.is_empty() && is_match(pattern, &name[1..])
        }
        (Some(b'?'), Some(_)) => is_match(&pattern[1..], &name[1..]),
        (Some(a), Some(b)) => a == b && is_match(&pattern[1..], &name[1..]),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names and contents.
    type Files<'a> = &'a [(&'a str, &'a str)];

    /// The files that are read, by their paths below the directory.
    fn read_in(dir: &Path, files: Files) -> Result<Vec<String>> {
        for (name, text) in files {
            let path = dir.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text.replace("DIR", &dir.display().to_string())).unwrap();
        }
        let found = read(&dir.join("config.toml"))?;
        let short = |f: &File| f.path.strip_prefix(dir).unwrap().display().to_string();
        Ok(found.iter().map(short).collect())
    }

    #[test]
    fn imports_are_followed_in_containerds_order() {
        let (glob, one) = ("imports = [\"DIR/conf.d/*.toml\"]", "imports = [\"conf.d/../x.toml\"]");
        let table: [(Files, &[&str]); 8] = [
            (&[], &[]),
            (&[("config.toml", "root = \"/a\"")], &["config.toml"]),
            // What matches nothing is fine.
            (&[("config.toml", glob)], &["config.toml"]),
            (
                &[
                    ("config.toml", glob),
                    ("conf.d/b.toml", ""),
                    ("conf.d/a.toml", ""),
                    ("conf.d/c", ""),
                ],
                &["config.toml", "conf.d/a.toml", "conf.d/b.toml"],
            ),
            (&[("config.toml", one), ("x.toml", "")], &["config.toml", "x.toml"]),
            // A circle; and one that comes twice.
            (
                &[
                    ("config.toml", "imports = [\"x.toml\", \"y.toml\"]"),
                    ("x.toml", "imports = [\"config.toml\", \"z.toml\"]"),
                    ("y.toml", "imports = [\"./x.toml\"]"),
                    ("z.toml", ""),
                ],
                &["config.toml", "x.toml", "y.toml", "z.toml"],
            ),
            (
                &[("config.toml", "imports = [\"*/in?er.*\"]"), ("sub/inner.toml", "")],
                &["config.toml", "sub/inner.toml"],
            ),
            (&[("config.toml", "imports = []")], &["config.toml"]),
        ];
        for (files, expected) in table {
            let dir = tempfile::tempdir().unwrap();
            assert_eq!(read_in(dir.path(), files).unwrap(), expected, "{files:?}");
        }
    }

    #[test]
    fn what_cannot_be_followed_is_an_error() {
        let chain = (0..=MOST).map(|i| {
            let name = if i == 0 { "config.toml".to_owned() } else { format!("{i}.toml") };
            (name, format!("imports = [\"{}.toml\"]", i + 1))
        });
        let chain: Vec<_> = chain.collect();
        let chain: Vec<_> = chain.iter().map(|(name, text)| (&**name, &**text)).collect();
        let table: [(Files, &str); 7] = [
            (&[("config.toml", "imports = [\"none.toml\"]")], "is not there"),
            (&[("config.toml", "imports = [\"x\"]"), ("x", "root =")], "x"),
            (&[("config.toml", "imports = \"x\"")], "imports is"),
            (&[("config.toml", "imports = [1]")], "imports is"),
            (&[("config.toml", "imports = [\"DIR/[ab]*\"]")], "not understood"),
            (&[("config.toml", "root =")], "config.toml"),
            (&chain, "file number 65"),
        ];
        for (files, expected) in table {
            let dir = tempfile::tempdir().unwrap();
            let error = format!("{:#}", read_in(dir.path(), files).unwrap_err());
            assert!(error.contains(expected), "{files:?}: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("x.toml")).unwrap();
        assert!(read_in(dir.path(), &[("config.toml", "imports = [\"*.toml\"]")]).is_err());
    }
}
