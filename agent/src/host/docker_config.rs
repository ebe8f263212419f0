//! Where the daemons' configuration files put their storage. Flags on a command line are not seen here,
//! but in what the running daemon holds open, and says of itself.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::block::DevNum;
use super::docker::is_circle;
use super::files;

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
    let docker = files::read_optional(Path::new(DOCKER_CONFIG))?.unwrap_or_default();
    let containerd = files::read_optional(Path::new(CONTAINERD_CONFIG))?.unwrap_or_default();
    let settings = settings(&docker, &containerd)?.into_iter();
    settings
        .map(|(setting, path)| {
            let (place, device) = match path.as_deref().map(Path::new).map(truth) {
                Some(found) => found.with_context(|| format!("looking where {setting} leads"))?,
                None => (None, None),
            };
            Ok(Moved { setting, place, device })
        })
        .collect()
}

/// Where containerd keeps its data, by its configuration file.
pub fn containerd_root() -> Result<String> {
    let text = files::read_optional(Path::new(CONTAINERD_CONFIG))?.unwrap_or_default();
    let root = containerd_table(&text)?;
    let root = root.get("root").and_then(|root| root.as_str()).filter(|root| !root.is_empty());
    Ok(root.unwrap_or(CONTAINERD_ROOT).to_owned())
}

fn containerd_table(text: &str) -> Result<toml::Table> {
    text.parse().with_context(|| format!("reading {CONTAINERD_CONFIG}"))
}

/// The settings that move storage, in words and with the path, if it is one.
fn settings(docker: &str, containerd: &str) -> Result<Vec<(String, Option<String>)>> {
    let mut found = Vec::new();
    let json: serde_json::Value = match docker.trim() {
        "" => serde_json::Value::Null,
        text => serde_json::from_str(text).with_context(|| format!("reading {DOCKER_CONFIG}"))?,
    };
    for key in ["data-root", "graph"] {
        if let Some(root) = json.get(key)
            && root != DOCKER_ROOT
        {
            let setting = format!("{DOCKER_CONFIG} sets \"{key}\" to {root}");
            found.push((setting, root.as_str().map(str::to_owned)));
        }
    }
    let table = containerd_table(containerd)?;
    let is_default = |root: &toml::Value| matches!(root.as_str(), Some("" | CONTAINERD_ROOT));
    if let Some(root) = table.get("root").filter(|root| !is_default(root)) {
        let setting = format!("{CONTAINERD_CONFIG} sets root to {root}");
        found.push((setting, root.as_str().map(str::to_owned)));
    }
    // A snapshotter keeps layers in a directory of its own, if it has one.
    let plugins = table.get("plugins").and_then(toml::Value::as_table);
    for (plugin, options) in plugins.into_iter().flatten() {
        let root = options.get("root_path");
        if let Some(root) = root.filter(|root| root.as_str() != Some("")) {
            let setting = format!("{CONTAINERD_CONFIG} sets root_path of {plugin} to {root}");
            found.push((setting, root.as_str().map(str::to_owned)));
        }
    }
    Ok(found)
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

    #[test]
    fn every_setting_that_moves_storage_is_seen() {
        let of = |docker: &str, containerd: &str| settings(docker, containerd).unwrap();
        let table = [
            ("", "", vec![]),
            ("{}", "version = 2", vec![]),
            ("{\"data-root\": \"/var/lib/docker\"}", "root = \"/var/lib/containerd\"", vec![]),
            ("{\"data-root\": \"/srv\"}", "root = \"\"", vec![Some("/srv")]),
            ("{\"graph\": \"/srv\"}", "root = \"/mnt\"", vec![Some("/srv"), Some("/mnt")]),
            // What is no path is no default either.
            ("{\"data-root\": 1}", "root = 2", vec![None, None]),
            (
                "",
                "[plugins.\"io.containerd.snapshotter.v1.overlayfs\"]\nroot_path = \"/fast\"\n\
                 [plugins.other]\nroot_path = \"\"\n",
                vec![Some("/fast")],
            ),
        ];
        for (docker, containerd, expected) in table {
            let seen = of(docker, containerd);
            let paths: Vec<_> = seen.iter().map(|(_, path)| path.as_deref()).collect();
            assert_eq!(paths, expected, "{docker} {containerd}");
        }
        assert!(settings("{", "").is_err() && settings("", "root =").is_err());
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
