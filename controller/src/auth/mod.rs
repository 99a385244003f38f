//! Who asks, and what they may.
//!
//! A bearer's secret is `sct_` and 43 characters of base64url (32 random bytes). Only its SHA-256 is kept, and it is
//! looked up by that hash: how long a look-up takes tells nothing of a secret.

mod access;
mod session;
mod token;

pub use access::{Access, Caller, Denied, ROUTES, Reach, Route, find_route};
pub use session::{CSRF_HEADER, SESSION_MS, Session};
pub use token::{
    ADMIN_TOKEN_FILE, BootstrapError, DEFAULT_PROJECT, bootstrap, guest_token_id, join_token, new_guest_token,
    new_project, new_token, secret_sha256, token_of_id, token_of_secret,
};
