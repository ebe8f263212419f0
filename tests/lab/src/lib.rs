//! The lab: simulated EC2 instances in which hostagent is tested and shown, on one machine and
//! without AWS. An instance is a real Debian with real systemd, cloud-init, sshd and Docker under
//! QEMU; the cloud around it is `tests/cloud`. Run it as `cargo lab`.
//!
//! From the bottom up: `host` and `cache` prepare this machine; `image` makes the guest's disk;
//! `qemu`, `qmp`, `guest` and `vm` run one instance; `cloud` runs what surrounds it; `snapshot`
//! makes starting one cheap; `stage` puts them together for `scenarios`, which `runner` runs; and
//! `demo` does the same for somebody who watches.
//!
//! Disks can be broken here in every way in which they break elsewhere: `disk` looks at them from
//! outside, [`qemu::Fault`] makes them fail or hang, and a machine can be stopped at any moment to
//! take what a power cut would leave ([`vm::Vm::frozen`]).

// Values here are used or visibly thrown away; an attribute on every second function says nothing.
#![allow(clippy::must_use_candidate, clippy::return_self_not_must_use)]

pub mod cache;
pub mod cloud;
pub mod command;
pub mod demo;
pub mod disk;
pub mod guest;
pub mod host;
pub mod image;
pub mod package;
pub mod progress;
pub mod qemu;
pub mod qmp;
pub mod runner;
pub mod scenarios;
pub mod snapshot;
pub mod stage;
pub mod userdata;
pub mod vm;
