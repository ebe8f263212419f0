//! Configuration: typed values, their limits and defaults, and the reading of the files.
//!
//! `/etc/hostagent/hostagent.toml` comes first, then `conf.d/*.toml` beside it in the order of
//! their names; a later file's keys replace an earlier one's. Everything is optional, and the
//! defaults are the secure ones. A value that cannot be right is an error that names file, line,
//! key and reason ([`ConfigError`]); no command does anything with a configuration that has one.
//! What the values mean for a host is the business of the controls.

mod file;
mod values;

use serde::{Deserialize, Serialize};

pub use file::{ConfigError, Loaded, load};
pub use values::{DeviceName, KeyArn, MountPoint, Name, Port, Seconds};

/// Where the configuration is read from unless `--config` names another file.
pub const DEFAULT_PATH: &str = "/etc/hostagent/hostagent.toml";

/// The effective configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Config {
    /// What is demanded of the instance.
    pub instance: Instance,
    /// The encrypted data volume.
    pub volume: Volume,
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
    /// The name under which EC2 has the volume attached, such as `/dev/sdf`. Never a kernel name.
    pub device: DeviceName,
    /// Where it is mounted.
    pub mount_point: MountPoint,
    /// The filesystem it carries.
    pub filesystem: Filesystem,
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
            device: DeviceName("/dev/sdf".into()),
            mount_point: MountPoint("/data".into()),
            filesystem: Filesystem::Ext4,
            kms_keys: Vec::new(),
            wait_seconds: Seconds(600),
        }
    }
}

/// A filesystem that hostagent makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filesystem {
    /// ext4
    Ext4,
}

impl Filesystem {
    /// The name that `mount(8)` and `blkid(8)` use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
        }
    }
}

/// `[docker]`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Docker {
    /// When data that Docker has on the root disk is moved to the volume.
    pub migrate: Migrate,
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
}

impl Default for Sshd {
    fn default() -> Self {
        Self { port: Port(2222) }
    }
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
