//! What the operator's command shows: tables, YAML and the progress of an operation. Other front ends on a terminal use it too.

#![forbid(unsafe_code)]

pub mod disk_file;
pub mod fields;
pub mod progress;
pub mod table;
pub mod yaml;
