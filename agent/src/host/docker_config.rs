//! Where the daemons' configuration files put their storage. What the command lines of their units say
//! besides is in [`next_start`]; what the running daemons do, in what they hold open and say of
//! themselves.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::block::DevNum;
use super::docker::is_circle;
use super::files;

mod imports;
pub mod next_start;

use imports::File;

const DOCKER_CONFIG: &str = "/etc/docker/daemon.json";
const DOCKER_ROOT: &str = "/var/lib/docker";
const CONTAINERD_CONFIG: &str = "/etc/containerd/config.toml";
const CONTAINERD_ROOT: &str = "/var/lib/containerd";

/// Storage that is not in the default directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Which file says so, and how.
    pub setting: String,
    /// Where it is in truth: without links, as far as it exists. None if that cannot be told.
    pub place: Option<PathBuf>,
    /// The device that it is on, or will be when it is made.
    pub device: Option<DevNum>,
}

/// The storage that the configuration files move away from the default directories.
pub fn moved() -> Result<Vec<Moved>> {
    let mut settings = docker_settings(Path::new(DOCKER_CONFIG))?;
    settings.extend(containerd_settings(&imports::read(Path::new(CONTAINERD_CONFIG))?));
    settings.into_iter().map(Setting::follow).collect()
}

/// Where containerd keeps its data, by its configuration files.
pub fn containerd_root() -> Result<String> {
    let files = imports::read(Path::new(CONTAINERD_CONFIG))?;
    let root = root_of(&files).and_then(|(_, root)| root.as_str());
    Ok(root.unwrap_or(CONTAINERD_ROOT).to_owned())
}

/// A setting that moves storage.
struct Setting {
    /// In words.
    text: String,
    /// The path that it names; none for what is no path.
    path: Option<String>,
}

impl Setting {
    fn follow(self) -> Result<Moved> {
        let Self { text: setting, path } = self;
        let (place, device) = match path.as_deref().map(Path::new).map(truth) {
            Some(found) => found.with_context(|| format!("looking where {setting} leads"))?,
            None => (None, None),
        };
        Ok(Moved { setting, place, device })
    }
}

/// What a file of Docker's moves.
fn docker_settings(path: &Path) -> Result<Vec<Setting>> {
    let text = files::read_optional(path)?.unwrap_or_default();
    let path = path.display();
    let json: serde_json::Value = match text.trim() {
        "" => serde_json::Value::Null,
        text => serde_json::from_str(text).with_context(|| format!("reading {path}"))?,
    };
    let mut found = Vec::new();
    for key in ["data-root", "graph"] {
        if let Some(root) = json.get(key)
            && root != DOCKER_ROOT
        {
            let text = format!("{path} sets \"{key}\" to {root}");
            found.push(Setting { text, path: root.as_str().map(str::to_owned) });
        }
    }
    Ok(found)
}

/// The root that containerd's files set, and the file: an empty one does not count, as in containerd.
fn root_of(files: &[File]) -> Option<(&File, &toml::Value)> {
    files.iter().rev().find_map(|file| {
        let root = file.table.get("root").filter(|root| root.as_str() != Some(""))?;
        Some((file, root))
    })
}

/// What containerd's files move.
fn containerd_settings(files: &[File]) -> Vec<Setting> {
    let mut found = Vec::new();
    if let Some((file, root)) = root_of(files)
        && root.as_str() != Some(CONTAINERD_ROOT)
    {
        let text = format!("{} sets root to {root}", file.path.display());
        found.push(Setting { text, path: root.as_str().map(str::to_owned) });
    }
    // A snapshotter keeps layers in a directory of its own, if it has one. Each that is named counts:
    // which one outdoes which differs between versions of containerd.
    for File { path, table } in files {
        let plugins = table.get("plugins").and_then(toml::Value::as_table);
        for (plugin, options) in plugins.into_iter().flatten() {
            let root = options.get("root_path");
            if let Some(root) = root.filter(|root| root.as_str() != Some("")) {
                let text = format!("{} sets root_path of {plugin} to {root}", path.display());
                found.push(Setting { text, path: root.as_str().map(str::to_owned) });
            }
        }
    }
    found
}

/// Where a path leads in truth, and the device there. What does not exist yet will be made in the
/// nearest directory above that does.
fn truth(path: &Path) -> Result<(Option<PathBuf>, Option<DevNum>)> {
    let is_plain = path.components().all(|part| part != std::path::Component::ParentDir);
    if !path.is_absolute() || !is_plain {
        return Ok((None, None));
    }
    let mut above = path;
    loop {
        match fs::canonicalize(above) {
            Ok(real) => {
                let device = DevNum::of(fs::metadata(&real)?.dev());
                let rest = path.strip_prefix(above).unwrap_or(Path::new(""));
                let place = rest.components().fold(real, |place, part| place.join(part));
                return Ok((Some(place), Some(device)));
            }
            // A link that leads nowhere will not be made, but what it leads to may be.
            Err(e) if e.kind() == ErrorKind::NotFound && !above.is_symlink() => {}
            Err(e) if e.kind() == ErrorKind::NotFound || is_circle(&e) => return Ok((None, None)),
            Err(e) => return Err(e.into()),
        }
        let Some(parent) = above.parent() else { return Ok((None, None)) };
        above = parent;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containerd(texts: &[&str]) -> Vec<File> {
        let file = |(i, text): (usize, &&str)| File {
            path: format!("/{i}.toml").into(),
            table: text.parse().unwrap(),
        };
        texts.iter().enumerate().map(file).collect()
    }

    #[test]
    fn every_setting_that_moves_storage_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("daemon.json");
        let of = |text: &str| {
            fs::write(&file, text).unwrap();
            docker_settings(&file)
        };
        let table = [
            ("", vec![]),
            ("{}", vec![]),
            ("{\"data-root\": \"/var/lib/docker\"}", vec![]),
            ("{\"data-root\": \"/srv\"}", vec![Some("/srv")]),
            ("{\"graph\": \"/srv\"}", vec![Some("/srv")]),
            // What is no path is no default either.
            ("{\"data-root\": 1}", vec![None]),
        ];
        for (text, expected) in table {
            let seen = of(text).unwrap();
            let paths: Vec<_> = seen.iter().map(|setting| setting.path.as_deref()).collect();
            assert_eq!(paths, expected, "{text}");
        }
        assert!(of("{").is_err());
        let (default, mine) = ("root = \"/var/lib/containerd\"", "root = \"/mine\"");
        let overlayfs = "[plugins.\"io.containerd.snapshotter.v1.overlayfs\"]\n";
        let fast = format!("{overlayfs}root_path = \"/fast\"\n[plugins.other]\nroot_path = \"\"\n");
        let faster = format!("{overlayfs}root_path = \"/faster\"\n");
        let table: [(&[&str], &[Option<&str>]); 10] = [
            (&[], &[]),
            (&["version = 2"], &[]),
            (&[default], &[]),
            (&["root = \"\""], &[]),
            (&[mine], &[Some("/mine")]),
            (&["root = 2"], &[None]),
            (&[&fast], &[Some("/fast")]),
            // Of the root the last one counts, and an empty one is none.
            (&["version = 2", mine], &[Some("/mine")]),
            (&[mine, "root = \"\"", default], &[]),
            (&[&fast, &faster], &[Some("/fast"), Some("/faster")]),
        ];
        for (texts, expected) in table {
            let seen = containerd_settings(&containerd(texts));
            let paths: Vec<_> = seen.iter().map(|setting| setting.path.as_deref()).collect();
            assert_eq!(paths, expected, "{texts:?}");
        }
        let seen = containerd_settings(&containerd(&[default, mine]));
        assert_eq!(seen[0].text, "/1.toml sets root to \"/mine\"");
    }

    #[test]
    fn a_path_is_followed_to_where_it_leads() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        fs::create_dir_all(top.join("data/docker")).unwrap();
        std::os::unix::fs::symlink("data", top.join("link")).unwrap();
        std::os::unix::fs::symlink("none", top.join("dangling")).unwrap();
        std::os::unix::fs::symlink("circle", top.join("circle")).unwrap();
        let here = Some(DevNum::of(fs::metadata(&top).unwrap().dev()));
        let to = |place: &str| (Some(top.join(place)), here);
        let table = [
            ("data/docker", to("data/docker")),
            ("link/docker", to("data/docker")),
            // Not there yet.
            ("link/new/deep", to("data/new/deep")),
            ("dangling", (None, None)),
            ("dangling/x", (None, None)),
            ("circle/x", (None, None)),
            ("data/../data", (None, None)),
        ];
        for (path, expected) in table {
            assert_eq!(truth(&top.join(path)).unwrap(), expected, "{path}");
        }
        assert_eq!(truth(Path::new("relative")).unwrap(), (None, None));
    }
}
