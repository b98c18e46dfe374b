//! What led to a gRPC status that this side made of a failed connection.

use std::error::Error;
use std::io;
use std::iter::successors;

use tonic::Status;

/// From the status on, the innermost cause last; none of a status that came from the other side.
pub fn causes(status: &Status) -> impl Iterator<Item = &(dyn Error + 'static)> {
    successors(status.source(), |&error| error.source())
}

/// There was no connection to send anything over.
pub fn never_connected(status: &Status) -> bool {
    causes(status).any(|error| error.is::<tonic::ConnectError>())
}

/// The host answered for the process: there is none.
pub fn nobody_listens(status: &Status) -> bool {
    causes(status)
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
