//! For tests that need what not every machine has.

/// If set, a test that cannot run here fails: `deploy/test` sets it after it has installed all that is needed.
pub const REQUIRE: &str = "SUPERCLOUD_REQUIRE";

/// Says that a test does nothing here, and why.
///
/// # Panics
/// When [`REQUIRE`] is set.
pub fn skip(why: &str) {
    assert!(std::env::var_os(REQUIRE).is_none(), "{REQUIRE} is set, but this test cannot run: {why}");
    println!("SKIPPED: {why}");
}
