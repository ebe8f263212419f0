//! The values that a configuration is made of: types that hold only what can be right, each with the
//! reason why another value cannot.

use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};

macro_rules! checked_string {
    ($(#[$doc:meta])* $name:ident, $check:path) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(try_from = "String")]
        pub struct $name(pub(in crate::config) String);

        impl $name {
            /// The value as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(value: String) -> Result<Self, String> {
                $check(&value)?;
                Ok(Self(value))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

checked_string!(
    /// A device name as EC2's block device mapping has it (EC2 User Guide, device naming).
    DeviceName,
    check_device_name
);
checked_string!(
    /// An absolute, normalised path that can be a mount point without hiding the system.
    MountPoint,
    check_mount_point
);
checked_string!(
    /// A name that AWS gives to stacks, groups, hooks and resources.
    Name,
    check_name
);

checked_string!(
    /// An absolute, normalised path on this host.
    HostPath,
    check_host_path
);

impl MountPoint {
    /// The value as a path.
    #[must_use]
    pub fn path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl DeviceName {
    /// Whether `other` is this device: EC2 reports a name with or without `/dev/`.
    #[must_use]
    pub fn is(&self, other: &str) -> bool {
        let bare = |s: &str| s.strip_prefix("/dev/").unwrap_or(s).to_owned();
        bare(&self.0) == bare(other)
    }
}

checked_string!(
    /// The path of a device that stands on several volumes: LVM, md or dm-crypt.
    AssembledDevice,
    check_assembled
);

fn check_assembled(value: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/-_.+".contains(c);
    let rest = value.strip_prefix("/dev/").unwrap_or_default();
    if rest.is_empty()
        || !value.chars().all(plain)
        || rest.split('/').any(|part| part.is_empty() || part == "." || part == "..")
    {
        return Err("must be the path of a device, such as \"/dev/mapper/data\"".into());
    }
    Ok(())
}

/// A tag that the volumes carry: its key and its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Tag {
    /// The key.
    pub key: String,
    /// The value.
    pub value: String,
}

impl TryFrom<String> for Tag {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err("must be a tag's key and value, such as \"Use=patient-data\"".into()),
        }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.key, self.value)
    }
}

/// One value, or a list of values that is not empty and names nothing twice.
#[derive(Debug)]
pub(in crate::config) struct OneOrMore<T>(pub(in crate::config) Vec<T>);

impl<'de, T> Deserialize<'de> for OneOrMore<T>
where
    T: TryFrom<String, Error = String> + PartialEq + fmt::Display,
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Values<T>(PhantomData<T>);

        impl<'de, T> serde::de::Visitor<'de> for Values<T>
        where
            T: TryFrom<String, Error = String> + PartialEq + fmt::Display,
        {
            type Value = OneOrMore<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(OneOrMore(vec![T::try_from(text.to_owned()).map_err(E::custom)?]))
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> Result<Self::Value, A::Error> {
                use serde::de::Error as _;
                let mut values: Vec<T> = Vec::new();
                while let Some(text) = list.next_element::<String>()? {
                    let value = T::try_from(text).map_err(A::Error::custom)?;
                    if values.contains(&value) {
                        return Err(A::Error::custom(format!("names {value} twice")));
                    }
                    values.push(value);
                }
                if values.is_empty() {
                    return Err(A::Error::custom("is an empty list; name at least one"));
                }
                Ok(OneOrMore(values))
            }
        }

        deserializer.deserialize_any(Values(PhantomData))
    }
}

/// A TCP port, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "i64")]
pub struct Port(pub(in crate::config) u16);

impl Port {
    /// The port's number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<i64> for Port {
    type Error = String;
    fn try_from(value: i64) -> Result<Self, String> {
        match u16::try_from(value) {
            Ok(port) if port > 0 => Ok(Self(port)),
            _ => Err(format!("{value} is not a TCP port; use 1 to 65535")),
        }
    }
}

/// A duration in whole seconds, from one second to 12 hours (CloudFormation's longest wait).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "i64")]
pub struct Seconds(pub(in crate::config) u32);

impl Seconds {
    /// As a number of seconds.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }

    /// As a duration.
    #[must_use]
    pub fn duration(self) -> std::time::Duration {
        std::time::Duration::from_secs(self.0.into())
    }
}

impl TryFrom<i64> for Seconds {
    type Error = String;
    fn try_from(value: i64) -> Result<Self, String> {
        match u32::try_from(value) {
            Ok(seconds) if (1..=43_200).contains(&seconds) => Ok(Self(seconds)),
            _ => Err(format!("{value} is out of range; use 1 to 43200 seconds")),
        }
    }
}

fn check_device_name(value: &str) -> Result<(), String> {
    let name = value
        .strip_prefix("/dev/")
        .ok_or("must be EC2's device name with /dev/ in front, such as \"/dev/sdf\"")?;
    if name.starts_with("nvme") {
        return Err("is a kernel name, which may be another disk after the next boot; use the \
                    name in EC2's block device mapping, such as \"/dev/sdf\""
            .into());
    }
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if name.len() < 2 || !name.chars().all(plain) {
        return Err("must be EC2's device name, such as \"/dev/sdf\"".into());
    }
    Ok(())
}

/// Trees in which nothing may be mounted, and directories that may not be hidden by a mount.
const FORBIDDEN_TREES: [&str; 19] = [
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/sys",
    "/tmp",
    "/usr",
    "/var/lib/containerd",
    "/var/lib/docker",
    "/var/lib/hostagent",
    "/var/run",
];
const FORBIDDEN_EXACT: [&str; 8] =
    ["/", "/home", "/var", "/var/cache", "/var/lib", "/var/log", "/var/spool", "/var/tmp"];

fn check_mount_point(value: &str) -> Result<(), String> {
    // The mount unit is named after it, and a file's name has at most 255 bytes.
    if value.len() > 100 {
        return Err("is too long; use at most 100 characters".into());
    }
    if !value.starts_with('/') {
        return Err("must be an absolute path, such as \"/data\"".into());
    }
    if FORBIDDEN_EXACT.contains(&value)
        || FORBIDDEN_TREES.iter().any(|tree| Path::new(value).starts_with(tree))
    {
        return Err("belongs to the system and cannot be the data volume's mount point; use a \
                    directory of its own, such as \"/data\""
            .into());
    }
    if value[1..].split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(
            "must be normalised: no empty part, no \".\" or \"..\", no slash at the end".into()
        );
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "/-_.".contains(c);
    if !value.chars().all(plain) {
        return Err("may hold only letters, digits, '/', '-', '_' and '.'".into());
    }
    Ok(())
}

fn check_host_path(value: &str) -> Result<(), String> {
    if !value.starts_with('/') || value.chars().any(char::is_control) {
        return Err("must be an absolute path, such as \"/etc/localtime\"".into());
    }
    let odd = |part: &str| part.is_empty() || part == "." || part == "..";
    if value != "/" && value[1..].split('/').any(odd) {
        return Err(
            "must be normalised: no empty part, no \".\" or \"..\", no slash at the end".into()
        );
    }
    Ok(())
}

fn check_name(value: &str) -> Result<(), String> {
    if value.is_empty() || value.len() > 2048 || value.chars().any(char::is_control) {
        return Err("must not be empty, and must hold no control characters".into());
    }
    Ok(())
}

checked_string!(
    /// The ARN of a KMS key.
    KeyArn,
    check_key_arn
);

fn check_key_arn(value: &str) -> Result<(), String> {
    // DescribeVolumes answers with the key's ARN, never with an alias: an alias would match nothing.
    let mut parts = value.splitn(6, ':');
    let shape = (parts.next(), parts.nth(1), parts.nth(2));
    match shape {
        (Some("arn"), Some("kms"), Some(resource)) if resource.starts_with("key/") => Ok(()),
        _ => Err("must be the ARN of a key (not of an alias): \
                  arn:aws:kms:REGION:ACCOUNT:key/ID"
            .into()),
    }
}
