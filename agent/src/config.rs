//! Configuration: typed values, their limits and defaults, and the reading of the files.
//!
//! `/etc/hostagent/hostagent.toml` comes first, then `conf.d/*.toml` beside it in the order of
//! their names; a later file's keys replace an earlier one's. Everything is optional, and the
//! defaults are the secure ones. A value that cannot be right is an error that names file, line,
//! key and reason ([`ConfigError`]); no command does anything with a configuration that has one.
//! What the values mean for a host is the business of the controls.

mod file;
mod values;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use crate::host::block::VolumeId;
pub use file::{ConfigError, Loaded, load};
pub use values::{
    AssembledDevice, DeviceName, HostPath, KeyArn, MountPoint, Name, Port, Seconds, Tag,
};

/// Where the configuration is read from unless `--config` names another file.
pub const DEFAULT_PATH: &str = "/etc/hostagent/hostagent.toml";

/// The effective configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Config {
    /// What is demanded of the instance.
    pub instance: Instance,
    /// The encrypted data volume.
    pub volume: Volume,
    /// The volume that the system is on.
    pub root: Root,
    /// Docker and containerd.
    pub docker: Docker,
    /// The SSH daemon.
    pub sshd: Sshd,
    /// Who is told whether the host became ready.
    pub signal: Signal,
    /// Limits of one run.
    pub run: Run,
}

/// `[instance]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// Tenancies that are accepted.
    pub tenancy: Vec<Tenancy>,
}

impl Default for Instance {
    fn default() -> Self {
        Self { tenancy: vec![Tenancy::Dedicated, Tenancy::Host] }
    }
}

/// A tenancy that gives the hardware to one account, as `DescribeInstances` spells it
/// (`Placement.Tenancy`). EC2's third value, `default`, is shared hardware and cannot be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tenancy {
    /// A Dedicated Instance.
    Dedicated,
    /// An instance on a Dedicated Host.
    Host,
}

impl Tenancy {
    /// EC2's spelling.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dedicated => "dedicated",
            Self::Host => "host",
        }
    }
}

/// `[volume]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// Which of the attached volumes it is.
    pub select: Select,
    /// The device that stands on the selected volumes, where that is not the one volume's own disk:
    /// LVM, md or dm-crypt, which hostagent does not make.
    pub assembled: Option<AssembledDevice>,
    /// Where it is mounted.
    pub mount_point: MountPoint,
    /// The filesystem it carries.
    pub filesystem: Filesystem,
    /// Whether the filesystem grows when the volume has grown.
    pub grow: bool,
    /// Volumes that may be formatted although they hold something, as long as nothing recognises it.
    pub format_unrecognised: Vec<VolumeId>,
    /// ARNs of the KMS keys that are accepted; empty accepts every key.
    pub kms_keys: Vec<String>,
    /// How long `provision` waits for the attachment, in seconds.
    pub wait_seconds: Seconds,
}

impl Volume {
    /// Whether a key, if any is known, is one of those that are accepted.
    #[must_use]
    pub fn accepts_key(&self, key: Option<&str>) -> bool {
        self.kms_keys.is_empty() || key.is_some_and(|key| self.kms_keys.iter().any(|k| k == key))
    }
}

impl Default for Volume {
    fn default() -> Self {
        Self {
            select: Select::Device(vec![DeviceName("/dev/sdf".into())]),
            assembled: None,
            mount_point: MountPoint("/data".into()),
            filesystem: Filesystem::Ext4,
            grow: false,
            format_unrecognised: Vec::new(),
            kms_keys: Vec::new(),
            wait_seconds: Seconds(600),
        }
    }
}

/// How the data volume is chosen among those that EC2 has attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Select {
    /// By the names under which EC2 has them attached, such as `/dev/sdf`. Never kernel names.
    Device(Vec<DeviceName>),
    /// By their ids.
    Id(Vec<VolumeId>),
    /// All that carry this tag.
    Tag(Tag),
}

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let join = |names: Vec<&str>| names.join(" and ");
        match self {
            Self::Device(names) => {
                write!(f, "as {}", join(names.iter().map(DeviceName::as_str).collect()))
            }
            Self::Id(ids) => {
                write!(f, "with the id {}", join(ids.iter().map(VolumeId::as_str).collect()))
            }
            Self::Tag(tag) => write!(f, "with the tag {tag}"),
        }
    }
}

/// A filesystem that hostagent makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filesystem {
    /// ext4
    Ext4,
    /// XFS, with `ftype=1`.
    Xfs,
}

impl Filesystem {
    /// The name that `mount(8)` and `blkid(8)` use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

/// `[root]`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Root {
    /// What is done about a root volume that is not encrypted.
    pub encryption: RootEncryption,
}

/// What is done about a root volume that EC2 does not say is encrypted. Whatever it is, nothing that
/// a container says may be kept there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RootEncryption {
    /// The host is not ready.
    #[default]
    Require,
    /// It is said, and the host can be ready.
    Warn,
    /// The host can be ready.
    Allow,
}

/// `[docker]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Docker {
    /// When data that Docker has on the root disk is moved to the volume.
    pub migrate: Migrate,
    /// What containers may have mounted from elsewhere than the volume: each path with what is below
    /// it; `/` means the root directory itself.
    pub allowed_mounts: Vec<HostPath>,
    /// What is done about Docker's own configuration.
    pub daemon: Hardening,
}

/// What programs commonly want of the host, none of which is written to. `docker-init` is what Docker
/// mounts for `--init`: as its own packages, Debian's and Ubuntu's have it.
const ALLOWED_MOUNTS: [&str; 12] = [
    "/etc/localtime",
    "/etc/machine-id",
    "/etc/os-release",
    "/etc/ssl/certs",
    "/etc/timezone",
    "/lib/modules",
    "/usr/bin/docker-init",
    "/usr/libexec/docker/docker-init",
    "/usr/local/share/ca-certificates",
    "/usr/sbin/docker-init",
    "/usr/share/ca-certificates",
    "/usr/share/zoneinfo",
];

impl Default for Docker {
    fn default() -> Self {
        Self {
            migrate: Migrate::default(),
            allowed_mounts: ALLOWED_MOUNTS.map(|path| HostPath(path.into())).into(),
            daemon: Hardening::default(),
        }
    }
}

/// When data is moved to the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Migrate {
    /// While no container runs.
    #[default]
    Stopped,
    /// At once; containers that run are stopped.
    Running,
    /// Never: Docker is stopped, and its data is left where it is.
    Never,
}

/// `[sshd]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sshd {
    /// The one port on which sshd answers.
    pub port: Port,
    /// What is done about logins with passwords, weak algorithms and the like.
    pub hardening: Hardening,
}

impl Default for Sshd {
    fn default() -> Self {
        Self { port: Port(2222), hardening: Hardening::default() }
    }
}

/// What is done about what a daemon, sshd or Docker, lets others do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hardening {
    /// It is put right, and the host is not ready before.
    #[default]
    Enforce,
    /// It is said, and the host can be ready.
    Report,
    /// It is not looked at.
    Off,
}

/// `[signal]`: what is unset is taken from the instance's tags.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Signal {
    /// CloudFormation stack, by name or ARN.
    pub stack: Option<String>,
    /// Logical id of the resource in that stack that waits for the signal.
    pub resource: Option<String>,
    /// Auto Scaling group.
    pub group: Option<String>,
    /// Launch lifecycle hook of that group.
    pub hook: Option<String>,
}

/// `[run]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Run {
    /// The longest that one `provision` may take, in seconds; then the host is not ready.
    pub deadline_seconds: Seconds,
}

impl Default for Run {
    fn default() -> Self {
        Self { deadline_seconds: Seconds(1800) }
    }
}
