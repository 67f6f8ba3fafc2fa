//! Answers with a date where the HTTP library could not put one.

use std::time::SystemTime;

use http::{HeaderValue, Response, header};

use crate::units::has_date;

/// To be put around every gRPC service: hyper gives each answer that has no `date` one, and panics where the clock is
/// before 1970 or after 9999.
pub(crate) fn dated<B>(response: Response<B>) -> Response<B> {
    dated_at(response, SystemTime::now())
}

fn dated_at<B>(mut response: Response<B>, now: SystemTime) -> Response<B> {
    if !has_date(now) {
        let epoch = HeaderValue::from_static("Thu, 01 Jan 1970 00:00:00 GMT");
        response.headers_mut().insert(header::DATE, epoch);
    }
    response
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_answer_has_a_date_where_the_library_has_none() {
        for (now, has) in [
            (SystemTime::UNIX_EPOCH - Duration::from_secs(1), true),
            (SystemTime::now(), false),
            (SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40), true),
        ] {
            let answer = dated_at(Response::new(()), now);
            assert_eq!(answer.headers().contains_key(header::DATE), has, "{now:?}");
        }
    }
}
