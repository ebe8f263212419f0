//! Where the next start of Docker and containerd would keep data, by the command lines and variables of
//! their units. The gate sees none of it: it reads files, and asks nobody.

use std::path::Path;

use anyhow::Result;

use super::{
    CONTAINERD_ROOT, DOCKER_ROOT, Moved, Setting, containerd_settings, docker_settings, imports,
};
use crate::host::block::DevNum;
use crate::host::command_line::{variables_of_unit, words_of_unit};
use crate::host::dockerd::{self, flags};
use crate::host::mounts;
use crate::host::systemd::Systemd;

const CONTAINERD: &str = "containerd.service";

/// Where Docker keeps what it pulls and loads until it is unpacked, if not below its root directory
/// (docs.docker.com, dockerd, "Daemon environment variables").
const TEMPORARY: &str = "DOCKER_TMPDIR";

/// Says what the next start of a daemon would keep off the volume that is mounted on the mount point;
/// none if nothing.
pub async fn off_volume(systemd: &Systemd, mount_point: &Path) -> Result<Option<String>> {
    let mut settings = Vec::new();
    if systemd.unit(dockerd::SERVICE).await?.exists() {
        settings.extend(of_dockerd(&words_of_unit(systemd, dockerd::SERVICE).await?)?);
        let variables = variables_of_unit(systemd, dockerd::SERVICE).await?;
        settings.extend(temporary(variables.get(TEMPORARY).map(String::as_str)));
    }
    if systemd.unit(CONTAINERD).await?.exists() {
        settings.extend(of_containerd(&words_of_unit(systemd, CONTAINERD).await?)?);
    }
    let volume = mounts::at(mount_point)?.last().map(|mount| mount.device);
    for setting in settings {
        let moved = setting.follow()?;
        if !is_on(&moved, mount_point, volume) {
            return Ok(Some(format!(
                "{}, which is not on the volume as it is mounted on {} ({})",
                moved.setting,
                mount_point.display(),
                moved.device.map_or("it leads nowhere".into(), |number| format!("device {number}"))
            )));
        }
    }
    Ok(None)
}

/// Below the mount point, on what is mounted there; or below a default directory, which is put on the
/// volume, and whose mount is looked at for itself.
fn is_on(moved: &Moved, mount_point: &Path, volume: Option<DevNum>) -> bool {
    let Some(place) = &moved.place else { return false };
    let at_home = [DOCKER_ROOT, CONTAINERD_ROOT].iter().any(|top| place.starts_with(top));
    let on_volume = volume.is_some() && moved.device == volume;
    at_home || on_volume && place.starts_with(mount_point)
}

/// What dockerd's command line moves, by itself or by the file that it names.
fn of_dockerd(words: &[String]) -> Result<Vec<Setting>> {
    let flags = flags::parse(words);
    let last = |name: &str| flags.iter().rev().find(|f| f.name == name).map(|f| f.value.as_str());
    let mut found = Vec::new();
    for name in ["data-root", "graph"] {
        found.extend(last(name).and_then(|path| flag(dockerd::SERVICE, name, path, DOCKER_ROOT)));
    }
    if let Some(path) = last("config-file") {
        found.extend(docker_settings(Path::new(path))?);
    }
    Ok(found)
}

/// The same of containerd.
fn of_containerd(words: &[String]) -> Result<Vec<Setting>> {
    let mut found = Vec::new();
    if let Some(path) = last_of(words, &["root"]) {
        found.extend(flag(CONTAINERD, "root", &path, CONTAINERD_ROOT));
    }
    if let Some(path) = last_of(words, &["config", "c"]) {
        found.extend(containerd_settings(&imports::read(Path::new(&path))?));
    }
    Ok(found)
}

fn flag(unit: &str, name: &str, path: &str, default: &str) -> Option<Setting> {
    // Empty, it is as if it was not there.
    (!path.is_empty() && Path::new(path) != Path::new(default)).then(|| Setting {
        text: format!("the command line of {unit} has --{name} {path}"),
        path: Some(path.to_owned()),
    })
}

fn temporary(path: Option<&str>) -> Option<Setting> {
    path.filter(|path| !path.is_empty()).map(|path| Setting {
        text: format!("{} sets {TEMPORARY} to {path}", dockerd::SERVICE),
        path: Some(path.to_owned()),
    })
}

/// The last value of a flag that has one of these names, as Go's package `flag` reads it: with one dash
/// or two, and the value behind `=` or as the next word.
fn last_of(words: &[String], names: &[&str]) -> Option<String> {
    let mut found = None;
    let mut words = words.iter().skip(1);
    while let Some(word) = words.next() {
        let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        if names.contains(&name) {
            found = value.or_else(|| words.next().cloned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    fn paths(found: &[Setting]) -> Vec<&str> {
        found.iter().filter_map(|setting| setting.path.as_deref()).collect()
    }

    #[test]
    fn every_flag_that_moves_storage_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let json = file("x.json", "{\"data-root\": \"/json\"}");
        file("more.toml", "root = \"/more\"");
        let toml = file("x.toml", "imports = [\"m*.toml\"]\nroot = \"/toml\"");
        let table = [
            ("dockerd -H fd:// --containerd=/run/c.sock".to_owned(), vec![]),
            ("dockerd --data-root /srv".to_owned(), vec!["/srv"]),
            ("dockerd --data-root=/data/x --data-root=/srv".to_owned(), vec!["/srv"]),
            ("dockerd -g /srv".to_owned(), vec!["/srv"]),
            ("dockerd --data-root=/var/lib/docker/".to_owned(), vec![]),
            (format!("dockerd --config-file {json}"), vec!["/json"]),
            ("dockerd --config-file /no/such/file".to_owned(), vec![]),
        ];
        for (line, expected) in table {
            assert_eq!(paths(&of_dockerd(&words(&line)).unwrap()), expected, "{line}");
        }
        let table = [
            ("containerd".to_owned(), vec![]),
            ("containerd --state /srv -a /run/c.sock".to_owned(), vec![]),
            ("containerd --root /srv".to_owned(), vec!["/srv"]),
            ("containerd -root=/srv -l debug".to_owned(), vec!["/srv"]),
            ("containerd --root /var/lib/containerd".to_owned(), vec![]),
            (format!("containerd -c {toml}"), vec!["/more"]),
            (format!("containerd --config={toml} --root /srv"), vec!["/srv", "/more"]),
        ];
        for (line, expected) in table {
            assert_eq!(paths(&of_containerd(&words(&line)).unwrap()), expected, "{line}");
        }
        let broken = file("broken", "{");
        assert!(of_dockerd(&words(&format!("dockerd --config-file {broken}"))).is_err());
        assert!(of_containerd(&words(&format!("containerd -c {broken}"))).is_err());
        let seen = of_dockerd(&words("dockerd --data-root /srv")).unwrap();
        assert_eq!(seen[0].text, "the command line of docker.service has --data-root /srv");
        assert_eq!(temporary(Some("/srv")).and_then(|s| s.path).as_deref(), Some("/srv"));
        assert!(temporary(Some("")).is_none() && temporary(None).is_none());
    }

    #[test]
    fn only_below_the_mount_point_it_is_on_the_volume() {
        let (data, root) = (DevNum { major: 259, minor: 1 }, DevNum { major: 254, minor: 1 });
        let on = |place: Option<&str>, device, volume| {
            let place = place.map(Into::into);
            is_on(&Moved { setting: String::new(), place, device }, Path::new("/data"), volume)
        };
        let table = [
            (Some("/data/x"), Some(data), Some(data), true),
            (Some("/data"), Some(data), Some(data), true),
            (Some("/srv"), Some(root), Some(data), false),
            // Nothing is mounted; another disk is; the volume is elsewhere too.
            (Some("/data/x"), Some(root), None, false),
            (Some("/data/x"), None, None, false),
            (Some("/data/x"), Some(root), Some(data), false),
            (Some("/mnt/x"), Some(data), Some(data), false),
            (Some("/data2"), Some(data), Some(data), false),
            (Some("/var/lib/docker/tmp2"), Some(root), None, true),
            (Some("/var/lib/docker2"), Some(root), Some(data), false),
            (None, None, Some(data), false),
        ];
        for (place, device, volume, expected) in table {
            assert_eq!(on(place, device, volume), expected, "{place:?} {device:?} {volume:?}");
        }
    }
}
