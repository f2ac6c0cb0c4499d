package hidream

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// DefaultReconnectTime is how long a lost server is waited for where ReconnectPolicy does not say.
const DefaultReconnectTime = 5 * time.Minute

const (
	maxRetries = 2
	firstDelay = 100 * time.Millisecond
	maxDelay   = 5 * time.Second
)

// ReconnectPolicy says what a stream does when its connection is lost. Its zero value tries again for
// DefaultReconnectTime.
type ReconnectPolicy struct {
	// ReconnectTime is how long to go on without an answer; negative gives up at once.
	ReconnectTime time.Duration
	// OnConnectionLost, which may be nil, is called with the error before each new attempt.
	OnConnectionLost func(error)
}

func (p ReconnectPolicy) reconnectTime() time.Duration {
	if p.ReconnectTime == 0 {
		return DefaultReconnectTime
	}
	return p.ReconnectTime
}

// errStop ends a stream that has brought all that was wanted.
var errStop = errors.New("stop")

// resume calls a server-streaming method until it ends with OK, read fails, or no call is answered for
// too long. Each call starts after what the one before has brought. A server that does not even answer
// the first one is an error at once, unless it says when to try again: it may be the wrong address. What lost
// makes of the error is what the caller gets while no call is answered.
func resume[Response any](
	ctx context.Context,
	policy ReconnectPolicy,
	lost func(error) error,
	call func(context.Context) (grpc.ServerStreamingClient[Response], error),
	read func(*Response) error,
) error {
	isConnected := false
	numRetries := 0
	delay := firstDelay
	var lostSince time.Time
	for {
		err := readAll(ctx, call, func(response *Response) error {
			isConnected, delay, lostSince = true, firstDelay, time.Time{}
			return read(response)
		})
		var final *finalError
		if errors.As(err, &final) {
			return final.cause
		}
		if err == nil || ctx.Err() != nil {
			return err
		}
		if !isConnected {
			if numRetries++; !waitToRetry(ctx, numRetries, err) {
				return err
			}
			continue
		}
		if !isPassing(err) {
			return err
		}
		if lostSince.IsZero() {
			lostSince = time.Now()
		}
		lostErr := lost(err)
		left := policy.reconnectTime() - time.Since(lostSince)
		if left <= 0 {
			return lostErr
		}
		if policy.OnConnectionLost != nil {
			policy.OnConnectionLost(lostErr)
		}
		// Spread, or all who lost one server come back in the same moment.
		spread := time.Duration(float64(delay) * (0.5 + rand.Float64()/2))
		delay = min(2*delay, maxDelay)
		if !wait(ctx, min(max(spread, retryDelay(err)), left)) {
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// answer makes a call with one answer, with a deadline, and twice more where the server asks for that.
func answer[Request, Response any](
	ctx context.Context,
	timeout time.Duration,
	method func(context.Context, *Request, ...grpc.CallOption) (*Response, error),
	request *Request,
) (*Response, error) {
	if _, hasDeadline := ctx.Deadline(); !hasDeadline && timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	for numRetries := 1; ; numRetries++ {
		response, err := method(ctx, request)
		if err == nil || !waitToRetry(ctx, numRetries, err) {
			return response, err
		}
	}
}

// waitToRetry waits for as long as the server says, and says whether to try again.
func waitToRetry(ctx context.Context, numRetries int, err error) bool {
	delay := retryDelay(err)
	if status.Code(err) != codes.Unavailable || delay == 0 || numRetries > maxRetries {
		return false
	}
	if deadline, hasDeadline := ctx.Deadline(); hasDeadline && time.Until(deadline) <= delay {
		return false
	}
	return wait(ctx, delay)
}

// wait returns whether the time has passed before ctx has ended.
func wait(ctx context.Context, delay time.Duration) bool {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

func readAll[Response any](
	ctx context.Context,
	call func(context.Context) (grpc.ServerStreamingClient[Response], error),
	read func(*Response) error,
) error {
	// Leaving early must end the call, or it would live as long as the caller's context.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := call(ctx)
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := read(response); err != nil {
			return &finalError{cause: err}
		}
	}
}

// finalError is one of what arrived, not of the connection: another call would meet it again.
type finalError struct{ cause error }

func (e *finalError) Error() string { return e.cause.Error() }

func isPassing(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable:
		return true
	case codes.ResourceExhausted:
		// Too many streams; without a delay it is something else, and a deadline that is too near comes nearer.
		return retryDelay(err) > 0 && !isTooLate(err)
	default:
		return false
	}
}

func isTooLate(err error) bool {
	for _, detail := range status.Convert(err).Details() {
		if quota, isQuota := detail.(*errdetails.QuotaFailure); isQuota {
			for _, violation := range quota.GetViolations() {
				// A subject may be a caller of that name.
				if violation.GetQuotaId() == "deadline" {
					return true
				}
			}
		}
	}
	return false
}

func retryDelay(err error) time.Duration {
	for _, detail := range status.Convert(err).Details() {
		if retry, isRetry := detail.(*errdetails.RetryInfo); isRetry {
			return retry.GetRetryDelay().AsDuration()
		}
	}
	return 0
}
