//! The files: which are read and in which order, who may have written them, and where in them an
//! error is.

use std::fmt::{self, Write as _};
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::values::{
    AssembledDevice, DeviceName, HostPath, KeyArn, MountPoint, Name, OneOrMore, Port, Seconds, Tag,
};
use super::{
    Config, DEFAULT_PATH, Filesystem, Hardening, Migrate, RootEncryption, Select, Tenancy, VolumeId,
};

/// One file's content: every key optional, an unknown key an error.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    #[serde(deserialize_with = "section")]
    instance: FileInstance,
    #[serde(deserialize_with = "section")]
    volume: FileVolume,
    #[serde(deserialize_with = "section")]
    root: FileRoot,
    #[serde(deserialize_with = "section")]
    docker: FileDocker,
    #[serde(deserialize_with = "section")]
    sshd: FileSshd,
    #[serde(deserialize_with = "section")]
    signal: FileSignal,
    #[serde(deserialize_with = "section")]
    run: FileRun,
}

/// A section from a table only: by itself serde also fills a structure from a list, key by key.
fn section<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Table<T>(std::marker::PhantomData<T>);

    impl<'de, T: Deserialize<'de>> serde::de::Visitor<'de> for Table<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table")
        }

        fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(serde::de::value::MapAccessDeserializer::new(map))
        }
    }

    deserializer.deserialize_map(Table(std::marker::PhantomData))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileInstance {
    tenancy: Option<Tenancies>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileVolume {
    device: Option<OneOrMore<DeviceName>>,
    id: Option<OneOrMore<VolumeId>>,
    tag: Option<Tag>,
    assembled: Option<AssembledDevice>,
    mount_point: Option<MountPoint>,
    filesystem: Option<Filesystem>,
    grow: Option<bool>,
    format_unrecognised: Option<Vec<VolumeId>>,
    kms_keys: Option<Vec<KeyArn>>,
    wait_seconds: Option<Seconds>,
}

impl FileVolume {
    /// The volume is chosen in one way; two would leave open which one counts.
    fn check(&self, file: &Path) -> Result<(), ConfigError> {
        let ways = [
            ("volume.device", self.device.is_some()),
            ("volume.id", self.id.is_some()),
            ("volume.tag", self.tag.is_some()),
        ];
        let mut ways = ways.into_iter().filter(|(_, used)| *used).map(|(key, _)| key);
        match (ways.next(), ways.next()) {
            (Some(one), Some(other)) => Err(ConfigError {
                file: file.to_path_buf(),
                line: None,
                key: Some(other.to_owned()),
                reason: format!("stands beside {one}; choose the volume in one way only"),
            }),
            _ => Ok(()),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileRoot {
    encryption: Option<RootEncryption>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileDocker {
    migrate: Option<Migrate>,
    allowed_mounts: Option<Vec<HostPath>>,
    daemon: Option<Hardening>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileSshd {
    port: Option<Port>,
    hardening: Option<Hardening>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileSignal {
    stack: Option<Name>,
    resource: Option<Name>,
    group: Option<Name>,
    hook: Option<Name>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileRun {
    deadline_seconds: Option<Seconds>,
}

/// A list of accepted tenancies that is not empty: an empty one would accept nothing.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Vec<Tenancy>")]
struct Tenancies(Vec<Tenancy>);

impl TryFrom<Vec<Tenancy>> for Tenancies {
    type Error = String;
    fn try_from(value: Vec<Tenancy>) -> Result<Self, String> {
        if value.is_empty() {
            return Err("must name at least one of \"dedicated\" and \"host\"".into());
        }
        Ok(Self(value))
    }
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

impl Config {
    fn apply(&mut self, file: File) {
        let File { instance, volume, root, docker, sshd, signal, run } = file;
        set(&mut self.instance.tenancy, instance.tenancy.map(|t| t.0));
        // What a later file says of the choice replaces all of it.
        let select = (volume.device.map(|d| Select::Device(d.0)))
            .or(volume.id.map(|ids| Select::Id(ids.0)))
            .or(volume.tag.map(Select::Tag));
        set(&mut self.volume.select, select);
        set(&mut self.volume.assembled, volume.assembled.map(Some));
        set(&mut self.volume.mount_point, volume.mount_point);
        set(&mut self.volume.filesystem, volume.filesystem);
        set(&mut self.volume.grow, volume.grow);
        set(&mut self.volume.format_unrecognised, volume.format_unrecognised);
        set(
            &mut self.volume.kms_keys,
            volume.kms_keys.map(|keys| keys.into_iter().map(|key| key.0).collect()),
        );
        set(&mut self.volume.wait_seconds, volume.wait_seconds);
        set(&mut self.root.encryption, root.encryption);
        set(&mut self.docker.migrate, docker.migrate);
        set(&mut self.docker.allowed_mounts, docker.allowed_mounts);
        set(&mut self.docker.daemon, docker.daemon);
        set(&mut self.sshd.port, sshd.port);
        set(&mut self.sshd.hardening, sshd.hardening);
        let text = |name: Option<Name>| name.map(|n| Some(n.0));
        set(&mut self.signal.stack, text(signal.stack));
        set(&mut self.signal.resource, text(signal.resource));
        set(&mut self.signal.group, text(signal.group));
        set(&mut self.signal.hook, text(signal.hook));
        set(&mut self.run.deadline_seconds, run.deadline_seconds);
    }

    /// What no single value can get wrong, but two together can.
    fn check_whole(&self, last: &Path) -> Result<(), ConfigError> {
        let together = |key: &str, reason: &str| ConfigError {
            file: last.to_path_buf(),
            line: None,
            key: Some(key.to_owned()),
            reason: reason.to_owned(),
        };
        if self.volume.wait_seconds.get() >= self.run.deadline_seconds.get() {
            return Err(together(
                "volume.wait_seconds",
                "is not shorter than run.deadline_seconds, so the run would end while it waits; \
                 shorten the one or lengthen the other",
            ));
        }
        let several = match &self.volume.select {
            Select::Device(names) => names.len() > 1,
            Select::Id(ids) => ids.len() > 1,
            // How many carry it is known only to EC2.
            Select::Tag(_) => false,
        };
        if several && self.volume.assembled.is_none() {
            return Err(together(
                "volume.assembled",
                "is not set, and several volumes are chosen; name the device that stands on them, \
                 such as \"/dev/mapper/data\"",
            ));
        }
        Ok(())
    }
}

/// What is wrong with the configuration, and where.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError {
    file: PathBuf,
    line: Option<usize>,
    key: Option<String>,
    reason: String,
}

impl ConfigError {
    fn file(file: &Path, reason: impl Into<String>) -> Self {
        Self { file: file.to_path_buf(), line: None, key: None, reason: reason.into() }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = self.line.map(|line| format!(":{line}")).unwrap_or_default();
        let key = self.key.as_ref().map(|key| format!(": {key}")).unwrap_or_default();
        let text = format!("{}{line}{key}: {}", self.file.display(), self.reason);
        // One line of plain text, whatever the file has in its keys and values.
        text.chars().try_for_each(|c| {
            if c.is_control() { write!(f, "{}", c.escape_default()) } else { f.write_char(c) }
        })
    }
}

impl std::error::Error for ConfigError {}

/// The effective configuration and the files it was read from.
#[derive(Debug)]
pub struct Loaded {
    /// The result.
    pub config: Config,
    /// The files that were read, in order.
    pub files: Vec<PathBuf>,
}

/// Reads `path` (or the default file, which may be absent) and `conf.d/*.toml` beside it.
pub fn load(path: Option<&Path>) -> Result<Loaded, ConfigError> {
    let main = path.unwrap_or(Path::new(DEFAULT_PATH));
    let mut files = Vec::new();
    // A dangling link is there, and unreadable: only true absence of the default file is allowed.
    let absent = main.symlink_metadata().is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound);
    if path.is_some() || !absent {
        files.push(main.to_path_buf());
    }
    files.extend(fragments(&main.with_file_name("conf.d"))?);

    let mut config = Config::default();
    for file in &files {
        let text = read_trusted(file)?;
        let parsed = parse(file, &text)?;
        parsed.volume.check(file)?;
        config.apply(parsed);
    }
    config.check_whole(files.last().map_or(main, PathBuf::as_path))?;
    Ok(Loaded { config, files })
}

fn fragments(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(ConfigError::file(dir, format!("cannot be listed: {e}"))),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path =
            entry.map_err(|e| ConfigError::file(dir, format!("cannot be listed: {e}")))?.path();
        if path.extension().is_some_and(|ext| ext == "toml") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Reads a file that only root (or the caller) can have written: whoever can write the
/// configuration of a root program is root.
fn read_trusted(path: &Path) -> Result<String, ConfigError> {
    // Not blocking: a FIFO would wait for a writer for ever.
    let mut file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| ConfigError::file(path, format!("cannot be read: {e}")))?;
    let meta =
        file.metadata().map_err(|e| ConfigError::file(path, format!("cannot be read: {e}")))?;
    if !meta.is_file() {
        return Err(ConfigError::file(path, "is not a regular file"));
    }
    let me = nix::unistd::geteuid().as_raw();
    if meta.uid() != 0 && meta.uid() != me {
        return Err(ConfigError::file(
            path,
            format!("belongs to user {}, not to root; run: chown root:root", meta.uid()),
        ));
    }
    let mode = meta.permissions().mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(ConfigError::file(
            path,
            format!("is writable by others than its owner (mode {mode:04o}); run: chmod go-w"),
        ));
    }
    let mut text = String::new();
    file.read_to_string(&mut text)
        .map_err(|e| ConfigError::file(path, format!("cannot be read: {e}")))?;
    Ok(text)
}

fn parse(path: &Path, text: &str) -> Result<File, ConfigError> {
    toml::from_str(text).map_err(|e| {
        let span = e.span();
        ConfigError {
            file: path.to_path_buf(),
            line: span
                .as_ref()
                .map(|span| text.get(..span.start).unwrap_or(text).matches('\n').count() + 1),
            key: span.and_then(|span| {
                key_at(text, span.start).or_else(|| key_on_line(text, span.start))
            }),
            reason: e.message().replace('\n', "; "),
        }
    })
}

/// What stands before the equals sign on the line of the byte `at`; for what does not parse at all.
fn key_on_line(text: &str, at: usize) -> Option<String> {
    let line = text.get(..at)?.rfind('\n').map_or(0, |newline| newline + 1);
    let (key, _) = text[line..].lines().next()?.split_once('=')?;
    Some(key.trim().to_owned()).filter(|key| !key.is_empty())
}

/// The dotted name of the key whose key or value covers the byte `at`.
fn key_at(text: &str, at: usize) -> Option<String> {
    use toml::de::{DeTable, DeValue};
    fn find(table: &DeTable<'_>, at: usize, path: &str) -> Option<String> {
        for (key, value) in table {
            let name = if path.is_empty() {
                key.get_ref().to_string()
            } else {
                format!("{path}.{}", key.get_ref())
            };
            if let DeValue::Table(inner) = value.get_ref()
                && let Some(found) = find(inner, at, &name)
            {
                return Some(found);
            }
            let covers = |span: std::ops::Range<usize>| {
                span.start <= at && at < span.end.max(span.start + 1)
            };
            if covers(key.span()) || covers(value.span()) {
                return Some(name);
            }
        }
        None
    }
    let (table, _) = DeTable::parse_recoverable(text);
    find(table.get_ref(), at, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        parse(Path::new("/f.toml"), text).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn every_error_names_file_line_key_and_reason() {
        let table = [
            ("[sshd]\nport = 0\n", "/f.toml:2: sshd.port: 0 is not a TCP port"),
            ("[sshd]\nport = 70000\n", "/f.toml:2: sshd.port: 70000 is not a TCP port"),
            ("[sshd]\nport = \"2222\"\n", "/f.toml:2: sshd.port: invalid type: string"),
            ("[sshd]\nhardening = true\n", "/f.toml:2: sshd.hardening: wanted string"),
            ("[docker]\ndaemon = false\n", "/f.toml:2: docker.daemon: wanted string"),
            ("[sshd]\nhardening = \"on\"\n", ":2: sshd.hardening: unknown variant `on`"),
            ("[sshd]\n\nprot = 1\n", "/f.toml:3: sshd.prot: unknown field `prot`"),
            ("colour = 1\n", "/f.toml:1: colour: unknown field `colour`"),
            ("[volume]\nmount_point = \"data\"\n", "/f.toml:2: volume.mount_point: must be an abs"),
            ("[volume]\nmount_point = \"/\"\n", "/f.toml:2: volume.mount_point: belongs to the"),
            ("[volume]\nmount_point = \"/var/lib/docker/x\"\n", ":2: volume.mount_point: belongs"),
            ("[volume]\nmount_point = \"/usr\"\n", "/f.toml:2: volume.mount_point: belongs to the"),
            ("[volume]\nmount_point = \"/a/../b\"\n", "volume.mount_point: must be normalised"),
            ("[volume]\nmount_point = \"/data/\"\n", "volume.mount_point: must be normalised"),
            ("[volume]\nmount_point = \"/da ta\"\n", "volume.mount_point: may hold only"),
            ("[volume]\nmount_point = \"/a\\nb\"\n", "volume.mount_point: may hold only"),
            ("[volume]\ndevice = \"/dev/nvme1n1\"\n", "volume.device: is a kernel name"),
            ("[volume]\ndevice = \"sdf\"\n", "volume.device: must be EC2's"),
            ("[volume]\ndevice = []\n", ":2: volume.device: is an empty list"),
            (
                "[volume]\ndevice = [\"/dev/sdf\", \"/dev/sdf\"]\n",
                ":2: volume.device: names /dev/sdf twice",
            ),
            ("[volume]\nid = \"vol-1\"\n", ":2: volume.id: \"vol-1\" is not a volume id"),
            ("[volume]\nid = 1\n", ":2: volume.id: invalid type: integer"),
            ("[volume]\ntag = \"x\"\n", ":2: volume.tag: must be a tag's key and value"),
            ("[volume]\nassembled = \"/dev/../x\"\n", ":2: volume.assembled: must be the path"),
            ("[volume]\nfilesystem = \"ntfs\"\n", ":2: volume.filesystem: unknown variant `ntfs`"),
            ("[volume]\ngrow = \"yes\"\n", ":2: volume.grow: invalid type: string"),
            (
                "[volume]\nformat_unrecognised = [\"/dev/sdf\"]\n",
                ":2: volume.format_unrecognised: \"/dev/sdf\" is not a volume id",
            ),
            ("[volume]\nformat_unrecognised = true\n", ":2: volume.format_unrecognised: invalid"),
            ("[root]\nencryption = \"maybe\"\n", ":2: root.encryption: unknown variant `maybe`"),
            ("[volume]\nkms_keys = [\n \"alias/x\"]\n", ":2: volume.kms_keys: must be the ARN"),
            ("[volume]\nwait_seconds = -1\n", ":2: volume.wait_seconds: -1 is out of range"),
            ("[docker]\nmigrate = \"yes\"\n", ":2: docker.migrate: unknown variant `yes`"),
            ("[docker]\nallowed_mounts = [\"srv\"]\n", ":2: docker.allowed_mounts: must be an abs"),
            ("[docker]\nallowed_mounts = [\"/a/\"]\n", ":2: docker.allowed_mounts: must be norm"),
            (
                "[docker]\nallowed_mounts = [\"/a/../b\"]\n",
                ":2: docker.allowed_mounts: must be norm",
            ),
            ("[docker]\nallowed_mounts = \"/a\"\n", ":2: docker.allowed_mounts: invalid type"),
            ("[instance]\ntenancy = []\n", ":2: instance.tenancy: must name at least one"),
            ("[instance]\ntenancy = [\"default\"]\n", ":2: instance.tenancy: unknown variant"),
            ("[signal]\nstack = \"\"\n", ":2: signal.stack: must not be empty"),
            ("[sshd]\nport = 22\nport = 23\n", "/f.toml:3: port: duplicate key"),
            ("[sshd\n", "/f.toml:1"),
        ];
        for (text, expected) in table {
            let got = error(text);
            assert!(got.contains(expected), "{text:?}\n  expected {expected}\n  got      {got}");
        }
    }

    #[test]
    fn a_later_file_replaces_only_what_it_names() {
        let mut config = Config::default();
        config.apply(
            parse(Path::new("a"), "[sshd]\nport = 22\n[volume]\ndevice=\"/dev/sdg\"").unwrap(),
        );
        config.apply(parse(Path::new("b"), "[sshd]\nport = 2200\n").unwrap());
        assert_eq!(config.sshd.port.get(), 2200);
        assert_eq!(config.volume.select.to_string(), "as /dev/sdg");
        config.apply(parse(Path::new("c"), "[volume]\ntag = \"Use=phi=1\"").unwrap());
        assert_eq!(config.volume.select.to_string(), "with the tag Use=phi=1");
        assert_eq!(config.volume.mount_point.as_str(), "/data");
    }

    #[test]
    fn the_shipped_file_is_the_defaults() {
        let shipped = include_str!("../../../config/hostagent.toml");
        let mut config = Config::default();
        config.apply(parse(Path::new("shipped"), shipped).unwrap());
        assert_eq!(config, Config::default());
        // Every commented line `#key = value` is a key that exists, at its default.
        let uncommented: String = shipped
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if !rest.starts_with(' ') => format!("{rest}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        let mut config = Config::default();
        config.apply(parse(Path::new("shipped"), &uncommented).unwrap());
        let signal = std::mem::take(&mut config.signal);
        assert_eq!(config, Config::default());
        assert!(signal.stack.is_some() && signal.hook.is_some(), "signal keys are shown");
    }

    #[test]
    fn the_volume_is_chosen_in_one_way() {
        let path = Path::new("f.toml");
        let two = "[volume]\ndevice = \"/dev/sdf\"\ntag = \"a=b\"\n";
        let error = parse(path, two).unwrap().volume.check(path).unwrap_err().to_string();
        assert_eq!(
            error,
            "f.toml: volume.tag: stands beside volume.device; choose the volume in one way only"
        );
        let mut config = Config::default();
        config.apply(parse(path, "[volume]\ndevice = [\"/dev/sdf\", \"/dev/sdg\"]\n").unwrap());
        assert!(config.check_whole(path).unwrap_err().to_string().contains("volume.assembled"));
        config.apply(parse(path, "[volume]\nassembled = \"/dev/mapper/data\"\n").unwrap());
        config.check_whole(path).unwrap();
    }

    #[test]
    fn ec2_reports_a_device_with_or_without_dev() {
        let device = DeviceName::try_from("/dev/sdf".to_owned()).unwrap();
        assert!(device.is("/dev/sdf") && device.is("sdf"));
        assert!(!device.is("sdff") && !device.is("/dev/sd") && !device.is("xvdf"));
    }
}
