//! What is granted is all that was asked for: a gang is there as a whole or not at all.

use portwarden::api::meaning::{Request, Response};
use portwarden::proto::v1;
use v1::port_request::Ports;

use crate::history::{End, History};

pub fn check(history: &History) -> Vec<String> {
    let answered = history.ops.iter().filter_map(|op| match (&op.request, &op.end) {
        (Request::Allocate(asked), End::Ok(Response::Allocate(got))) => Some((op.id, asked, got)),
        _ => None,
    });
    answered.filter_map(|(op, asked, got)| missing(op, asked, got)).collect()
}

fn missing(op: u64, asked: &v1::AllocateRequest, got: &v1::AllocateResponse) -> Option<String> {
    let asked: Vec<_> = asked.claims.iter().map(|c| (c.name.as_str(), ports(c))).collect();
    let got = got.allocations.iter().map(|a| (a.name.as_str(), a.ports.len()));
    let got: Vec<_> = got.collect();
    (asked != got).then(|| format!("op {op} asked for {asked:?} and got {got:?}"))
}

fn ports(claim: &v1::Claim) -> usize {
    let of = |request: &v1::PortRequest| match &request.ports {
        Some(Ports::Count(count) | Ports::Contiguous(count)) => *count as usize,
        Some(Ports::Specific(_)) => 1,
        None => 0, // that is refused
    };
    claim.ports.iter().map(of).sum()
}
