//! The role table: every route, and who may use it. What is not listed here is not served.

use axum::http::Method;
use supercloud_api::{
    Role, Token,
    ids::{GuestId, ProjectId},
};

/// Who may use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Everybody, without a token.
    Open,
    /// Every role; also a guest-scoped token, which then sees its own guest only.
    ReadOwn,
    /// Every role.
    Read,
    /// Every role: signing in and out of the dashboard.
    Session,
    /// Every role, if the token is good for all projects.
    ReadAll,
    /// Who moves guests: policy, operator, admin; also a guest-scoped token for its own guest.
    MoveOwn,
    /// Who moves guests: policy, operator, admin.
    Move,
    /// Who changes what belongs to a project: operator, admin.
    Change,
    /// Admins; those of one project for that project.
    Administer,
    /// Admins of everything.
    System,
}

impl Access {
    /// Whether a token may use a route of this kind. What it may *see* there is its [`Reach`].
    #[must_use]
    pub fn allows(self, token: &Token) -> bool {
        let is_global = token.project.is_none();
        if token.guest.is_some() {
            return match self {
                Self::Open | Self::ReadOwn => true,
                Self::MoveOwn => token.role >= Role::Policy,
                Self::Read
                | Self::Session
                | Self::ReadAll
                | Self::Move
                | Self::Change
                | Self::Administer
                | Self::System => false,
            };
        }
        match self {
            Self::Open | Self::ReadOwn | Self::Read | Self::Session => true,
            Self::ReadAll => is_global,
            Self::MoveOwn | Self::Move => token.role >= Role::Policy,
            Self::Change => token.role >= Role::Operator,
            Self::Administer => token.role >= Role::Admin,
            Self::System => token.role >= Role::Admin && is_global,
        }
    }
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Its verb.
    pub method: Method,
    /// Its path, as the router writes it.
    pub path: &'static str,
    /// Who may use it.
    pub access: Access,
}

/// What changes something and cannot be tried: it has no record that would be written, or is a piece of something larger.
const NOT_TRIED: &[&str] = &[
    "/v1/session",
    "/v1/join",
    "/v1/rentings/{renting}/join-token",
    "/v1/images/{image}/parts/{part}",
    "/v1/guests/{guest}/console/{console}/input",
    "/v1/feed",
];

impl Route {
    /// Whether `?dry_run=true` tells what it would do.
    #[must_use]
    pub fn is_triable(&self) -> bool {
        self.method != Method::GET && self.path.starts_with("/v1/") && !NOT_TRIED.contains(&self.path)
    }
}

const fn route(method: Method, path: &'static str, access: Access) -> Route {
    Route { method, path, access }
}

/// Every route.
pub const ROUTES: &[Route] = &[
    route(Method::GET, "/healthz", Access::Open),
    route(Method::GET, "/readyz", Access::Open),
    route(Method::GET, "/metrics", Access::ReadAll),
    route(Method::GET, "/v1/openapi.json", Access::Open),
    route(Method::GET, "/v1/whoami", Access::ReadOwn),
    route(Method::POST, "/v1/session", Access::Session),
    route(Method::DELETE, "/v1/session", Access::Session),
    route(Method::GET, "/v1/clouds", Access::ReadOwn),
    route(Method::POST, "/v1/clouds", Access::System),
    route(Method::GET, "/v1/clouds/{cloud}", Access::ReadOwn),
    route(Method::POST, "/v1/clouds/{cloud}/rent", Access::System),
    route(Method::GET, "/v1/rentings", Access::ReadAll),
    route(Method::GET, "/v1/rentings/{renting}", Access::ReadAll),
    route(Method::POST, "/v1/rentings/{renting}/return", Access::System),
    route(Method::POST, "/v1/rentings/{renting}/join-token", Access::System),
    route(Method::GET, "/v1/stores", Access::ReadAll),
    route(Method::POST, "/v1/stores/{store}/sweep", Access::System),
    route(Method::GET, "/v1/hosts", Access::Read),
    route(Method::GET, "/v1/hosts/{host}", Access::Read),
    route(Method::PATCH, "/v1/hosts/{host}", Access::System),
    route(Method::DELETE, "/v1/hosts/{host}", Access::System),
    route(Method::GET, "/v1/links", Access::Read),
    route(Method::POST, "/v1/join-tokens", Access::System),
    // The one-time token in the body is what permits it.
    route(Method::POST, "/v1/join", Access::Open),
    route(Method::GET, "/v1/projects", Access::Read),
    route(Method::POST, "/v1/projects", Access::System),
    route(Method::GET, "/v1/projects/{project}", Access::Read),
    route(Method::GET, "/v1/tokens", Access::Administer),
    route(Method::POST, "/v1/tokens", Access::Administer),
    route(Method::DELETE, "/v1/tokens/{token}", Access::Administer),
    route(Method::GET, "/v1/images", Access::Read),
    route(Method::POST, "/v1/images", Access::Change),
    route(Method::GET, "/v1/images/{image}", Access::Read),
    route(Method::GET, "/v1/images/{image}/sites", Access::Read),
    route(Method::DELETE, "/v1/images/{image}", Access::Change),
    route(Method::PUT, "/v1/images/{image}/parts/{part}", Access::Change),
    route(Method::GET, "/v1/images/{image}/parts/{part}", Access::Change),
    // What a disk holds may be a secret.
    route(Method::GET, "/v1/images/{image}/parts/{part}/blocks", Access::Change),
    route(Method::POST, "/v1/images/{image}/import", Access::Change),
    route(Method::GET, "/v1/volumes", Access::Read),
    route(Method::GET, "/v1/volumes/{volume}", Access::Read),
    route(Method::GET, "/v1/volumes/{volume}/sites", Access::Read),
    route(Method::POST, "/v1/volumes/{volume}/check", Access::Change),
    route(Method::GET, "/v1/volumes/{volume}/history", Access::Read),
    route(Method::PUT, "/v1/volumes/{volume}/history", Access::Change),
    route(Method::DELETE, "/v1/volumes/{volume}/history", Access::Change),
    route(Method::GET, "/v1/volumes/{volume}/as-of", Access::Read),
    route(Method::POST, "/v1/volumes/{volume}/points", Access::Change),
    route(Method::GET, "/v1/volumes/{volume}/blocks", Access::Change),
    route(Method::GET, "/v1/networks", Access::Read),
    route(Method::POST, "/v1/networks", Access::Change),
    route(Method::GET, "/v1/networks/{network}", Access::Read),
    route(Method::DELETE, "/v1/networks/{network}", Access::Change),
    route(Method::GET, "/v1/ports", Access::Read),
    route(Method::GET, "/v1/ports/{port}", Access::Read),
    route(Method::GET, "/v1/ports/{port}/flows", Access::Read),
    route(Method::GET, "/v1/guests", Access::Read),
    route(Method::POST, "/v1/guests", Access::Change),
    route(Method::GET, "/v1/guests/{guest}", Access::ReadOwn),
    route(Method::PATCH, "/v1/guests/{guest}", Access::Change),
    route(Method::DELETE, "/v1/guests/{guest}", Access::Change),
    // Hosts are named in it: as readable as these are.
    route(Method::GET, "/v1/guests/{guest}/placement", Access::Read),
    // What a guest says on its console may be a secret.
    route(Method::GET, "/v1/guests/{guest}/console", Access::Change),
    route(Method::POST, "/v1/guests/{guest}/console/{console}/input", Access::Change),
    route(Method::GET, "/v1/guests/{guest}/evacuation", Access::Read),
    route(Method::POST, "/v1/guests/{guest}/start", Access::Change),
    route(Method::POST, "/v1/guests/{guest}/stop", Access::Change),
    route(Method::POST, "/v1/guests/{guest}/migrate", Access::MoveOwn),
    route(Method::POST, "/v1/guests/{guest}/mirrors", Access::Change),
    route(Method::GET, "/v1/guests/{guest}/mirrors", Access::Read),
    route(Method::DELETE, "/v1/guests/{guest}/mirrors", Access::Change),
    route(Method::POST, "/v1/guests/{guest}/failover", Access::Change),
    route(Method::POST, "/v1/guests/{guest}/checkpoints", Access::Change),
    route(Method::POST, "/v1/guests/{guest}/freeze", Access::MoveOwn),
    route(Method::POST, "/v1/guests/{guest}/thaw", Access::Move),
    route(Method::GET, "/v1/groups", Access::Read),
    route(Method::POST, "/v1/groups", Access::Change),
    route(Method::GET, "/v1/groups/{group}", Access::Read),
    route(Method::PATCH, "/v1/groups/{group}", Access::Change),
    route(Method::DELETE, "/v1/groups/{group}", Access::Change),
    route(Method::POST, "/v1/groups/{group}/migrate", Access::Move),
    route(Method::POST, "/v1/groups/{group}/freeze", Access::Move),
    route(Method::POST, "/v1/groups/{group}/thaw", Access::Move),
    route(Method::GET, "/v1/freezes", Access::Read),
    route(Method::GET, "/v1/freezes/{freeze}", Access::Read),
    route(Method::GET, "/v1/operations", Access::Read),
    route(Method::GET, "/v1/operations/{operation}", Access::ReadOwn),
    route(Method::POST, "/v1/operations/{operation}/cancel", Access::MoveOwn),
    route(Method::GET, "/v1/evacuations", Access::Read),
    route(Method::GET, "/v1/reliability", Access::Read),
    route(Method::GET, "/v1/verdicts", Access::Read),
    route(Method::POST, "/v1/verdicts", Access::Move),
    // Nothing changes by it, but it takes a core for some seconds.
    route(Method::POST, "/v1/simulations", Access::Move),
    route(Method::GET, "/v1/plans", Access::ReadAll),
    route(Method::POST, "/v1/plans", Access::System),
    route(Method::GET, "/v1/plans/{plan}", Access::ReadAll),
    route(Method::POST, "/v1/plans/{plan}/apply", Access::System),
    route(Method::POST, "/v1/plans/{plan}/cancel", Access::System),
    route(Method::POST, "/v1/plans/{plan}/undo", Access::System),
    route(Method::GET, "/v1/events", Access::Read),
    route(Method::GET, "/v1/events/stream", Access::Read),
    route(Method::GET, "/v1/ledger", Access::Read),
    route(Method::GET, "/v1/markets", Access::Read),
    route(Method::GET, "/v1/prices", Access::Read),
    route(Method::POST, "/v1/feed", Access::System),
];

/// The route of a verb and a router's path.
#[must_use]
pub fn find_route(method: &Method, path: &str) -> Option<&'static Route> {
    ROUTES.iter().find(|route| route.path == path && route.method == method)
}

/// What a token can see. What lies outside is answered as if it did not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Everything.
    All,
    /// What belongs to a project.
    Project(ProjectId),
    /// One guest and its operations.
    Guest(ProjectId, GuestId),
}

/// Who asks.
#[derive(Debug, Clone, PartialEq)]
pub struct Caller {
    /// The token that was shown.
    pub token: Token,
}

/// Why somebody may not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the role {role:?} of this token does not allow {method} {path}")]
pub struct Denied {
    /// The role.
    pub role: Role,
    /// The verb.
    pub method: Method,
    /// The route.
    pub path: &'static str,
}

impl Caller {
    /// What they can see.
    #[must_use]
    pub fn reach(&self) -> Reach {
        match (self.token.project, self.token.guest) {
            (None, None) => Reach::All,
            (Some(project), None) => Reach::Project(project),
            (Some(project), Some(guest)) => Reach::Guest(project, guest),
            // Not made by us: reach nothing but the guest, in no project.
            (None, Some(guest)) => Reach::Guest(ProjectId::from_uuid(uuid_nil()), guest),
        }
    }

    /// Whether they can see what belongs to this project (`None`: to none, which only those who see everything do).
    #[must_use]
    pub fn sees_project(&self, project: Option<ProjectId>) -> bool {
        match self.reach() {
            Reach::All => true,
            Reach::Project(mine) => project == Some(mine),
            Reach::Guest(..) => false,
        }
    }

    /// Whether they can see this guest of this project.
    #[must_use]
    pub fn sees_guest(&self, project: ProjectId, guest: GuestId) -> bool {
        match self.reach() {
            Reach::All => true,
            Reach::Project(mine) => project == mine,
            Reach::Guest(mine, own) => project == mine && guest == own,
        }
    }

    /// The name under which events tell of them.
    #[must_use]
    pub fn actor(&self) -> String {
        match self.token.guest {
            Some(guest) => format!("guest:{guest}"),
            None => format!("token:{}", self.token.name),
        }
    }

    /// Checks the role table.
    ///
    /// # Errors
    /// When the token may not use the route.
    pub fn check(&self, route: &'static Route) -> Result<(), Denied> {
        if route.access.allows(&self.token) {
            return Ok(());
        }
        Err(Denied { role: self.token.role, method: route.method.clone(), path: route.path })
    }
}

fn uuid_nil() -> uuid::Uuid {
    uuid::Uuid::nil()
}

#[cfg(test)]
mod tests {
    use super::*;
    use supercloud_api::ids::TokenId;

    fn token(role: Role, project: bool, guest: bool) -> Token {
        Token {
            id: TokenId::generate(),
            name: "t".parse().unwrap(),
            project: project.then(ProjectId::generate),
            guest: guest.then(GuestId::generate),
            role,
            expires_at_ms: None,
            created_at_ms: 0,
        }
    }

    /// For each access the least role of a token for all, of one for a project, and whether a guest's own operator token passes.
    #[test]
    fn every_access_has_the_roles_that_it_should() {
        use Role::{Admin, Operator, Policy, Viewer};
        let table = [
            (Access::Open, Some(Viewer), Some(Viewer), true),
            (Access::ReadOwn, Some(Viewer), Some(Viewer), true),
            (Access::Read, Some(Viewer), Some(Viewer), false),
            (Access::Session, Some(Viewer), Some(Viewer), false),
            (Access::ReadAll, Some(Viewer), None, false),
            (Access::MoveOwn, Some(Policy), Some(Policy), true),
            (Access::Move, Some(Policy), Some(Policy), false),
            (Access::Change, Some(Operator), Some(Operator), false),
            (Access::Administer, Some(Admin), Some(Admin), false),
            (Access::System, Some(Admin), None, false),
        ];
        for (access, global, scoped, guest) in table {
            for role in [Viewer, Policy, Operator, Admin] {
                assert_eq!(access.allows(&token(role, false, false)), global.is_some_and(|least| role >= least));
                assert_eq!(access.allows(&token(role, true, false)), scoped.is_some_and(|least| role >= least));
            }
            assert_eq!(access.allows(&token(Operator, true, true)), guest, "{access:?}");
        }
        assert!(!Access::MoveOwn.allows(&token(Viewer, true, true)));
    }

    #[test]
    fn no_route_is_listed_twice_and_changes_need_a_token() {
        for (at, route) in ROUTES.iter().enumerate() {
            assert!(ROUTES[..at].iter().all(|other| (&other.method, other.path) != (&route.method, route.path)));
            let changes = route.method != Method::GET;
            assert!(!changes || route.access != Access::Open || route.path == "/v1/join", "{}", route.path);
            assert!(!changes || !matches!(route.access, Access::Read | Access::ReadOwn | Access::ReadAll));
        }
    }

    #[test]
    fn reach_ends_at_the_project_and_at_the_guest() {
        let all = Caller { token: token(Role::Viewer, false, false) };
        let one = Caller { token: token(Role::Admin, true, false) };
        let own = Caller { token: token(Role::Operator, true, true) };
        let (project, guest) = (own.token.project.unwrap(), own.token.guest.unwrap());
        assert!(all.sees_project(None) && all.sees_guest(project, guest));
        assert!(!one.sees_project(None) && !one.sees_project(Some(project)) && one.sees_project(one.token.project));
        assert!(!own.sees_project(Some(project)) && own.sees_guest(project, guest));
        assert!(!own.sees_guest(project, GuestId::generate()) && !own.sees_guest(ProjectId::generate(), guest));
    }
}
