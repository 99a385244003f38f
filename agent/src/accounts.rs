//! The users as which this host's processes run, looked up once at start.

use std::{
    ffi::{CStr, CString},
    io,
};

/// The largest entry of the account database that is taken, in bytes.
const MAX_ENTRY_BYTES: usize = 1 << 20;

/// Why a user cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    /// There is none of that name.
    #[error("{field}: this machine has no user '{name}'; {remedy}")]
    Unknown {
        /// The setting that names it.
        field: &'static str,
        /// The name.
        name: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The account database cannot be asked.
    #[error("{field}: the user '{name}' cannot be looked up")]
    LookUp {
        /// The setting that names it.
        field: &'static str,
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A user of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// Its number.
    pub uid: u32,
    /// Its primary group's number.
    pub gid: u32,
}

impl Account {
    /// The one that may do everything.
    pub const ROOT: Self = Self { uid: 0, gid: 0 };

    /// Looks a user up by name. Blocking.
    ///
    /// # Errors
    /// When there is none of that name: then `remedy` is told.
    pub fn named(field: &'static str, name: &str, remedy: &'static str) -> Result<Self, AccountError> {
        let unknown = || AccountError::Unknown { field, name: name.to_owned(), remedy };
        let text = CString::new(name).map_err(|_| unknown())?;
        let found = look_up(&text);
        found.map_err(|source| AccountError::LookUp { field, name: name.to_owned(), source })?.ok_or_else(unknown)
    }

    /// Whether the system's rights do not bind it.
    #[must_use]
    pub fn is_root(self) -> bool {
        self.uid == 0
    }
}

/// The entry of a user (getpwnam_r(3)).
fn look_up(name: &CStr) -> io::Result<Option<Account>> {
    let mut buffer = vec![0_u8; 4096];
    loop {
        // SAFETY: passwd is a C structure of numbers and pointers, for which all zeros is a valid value.
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        let mut found = std::ptr::null_mut();
        // SAFETY: the name ends with a zero; entry, buffer (with its true length) and found live over the call.
        let rc = unsafe {
            libc::getpwnam_r(name.as_ptr(), &raw mut entry, buffer.as_mut_ptr().cast(), buffer.len(), &raw mut found)
        };
        match rc {
            0 if found.is_null() => return Ok(None),
            0 => return Ok(Some(Account { uid: entry.pw_uid, gid: entry.pw_gid })),
            // Not found, by some databases (the manual names these).
            libc::ENOENT | libc::ESRCH => return Ok(None),
            libc::ERANGE if buffer.len() < MAX_ENTRY_BYTES => buffer.resize(buffer.len() * 4, 0),
            libc::EINTR => {}
            code => return Err(io::Error::from_raw_os_error(code)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_there_and_a_stranger_is_told_by_setting_and_remedy() {
        let root = Account::named("qemu_user", "root", "").unwrap();
        assert!(root.is_root());
        let error = Account::named("qemu_user", "no-such-user-here", "do this").unwrap_err().to_string();
        assert!(
            error.contains("qemu_user") && error.contains("no-such-user-here") && error.contains("do this"),
            "{error}"
        );
        assert!(Account::named("qemu_user", "a\0b", "").is_err());
    }
}
