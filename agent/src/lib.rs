//! hostagent makes a Docker host on EC2 fit to hold patient data, and refuses to call it ready until
//! that is proven.
//!
//! # The map
//!
//! Everything hostagent knows is a **control**: one requirement, in one file below [`controls`]. A
//! control *observes* (I/O: what is), *judges* (pure: what it means) and *plans* (pure: what would
//! put it right); [`control`] says what that is and holds the one ordered list of them.
//!
//! A plan is made of **steps**. [`step`] has every change that hostagent can make to a host, and the
//! one place where they are made; a step checks its precondition again at the moment it runs.
//!
//! [`engine`] runs the controls as a graph: `verify` observes and judges, `plan` shows the steps,
//! `provision` applies them and judges again from fresh facts. [`readiness`] turns the last report
//! into "ready" (marker, target, signals to AWS) or into its refusal. [`report`] turns it into text
//! and JSON.
//!
//! [`volume`] decides which device is the data volume, for the controls and for the steps alike.
//!
//! [`gate`] is the exception to the pattern: what systemd runs before every start of Docker, fast
//! and by this machine's own facts only.
//!
//! [`host`] and [`aws`] are the only code that touches the world. [`config`] is what the operator
//! says, [`cli`] is the command line, [`commands`] what each command does and its exit status,
//! [`journal`] where messages go.
//!
//! To add a control: a file in `controls/`, a line in [`control::REGISTRY`], its tests.

pub mod aws;
pub mod cli;
pub mod commands;
pub mod config;
pub mod control;
pub mod controls;
pub mod engine;
pub mod gate;
pub mod host;
pub mod journal;
pub mod readiness;
pub mod report;
pub mod step;
pub mod volume;
