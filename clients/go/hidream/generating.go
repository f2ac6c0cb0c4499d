package hidream

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

const (
	maxReconnectWindow = 30 * time.Second
	leaveTimeout       = 5 * time.Second
)

// LostJobError says that the server of a job that was followed does not answer. It wraps the error of the call.
type LostJobError struct {
	JobID string
	// RequestID is the id with which the same request of Generate goes on with the job, or has it drawn anew. It is
	// empty for a job that goes on by itself, which Watch follows.
	RequestID string
	Err       error
}

func (e *LostJobError) Error() string {
	if e.RequestID == "" {
		return fmt.Sprintf("%v (job %s)", e.Err, e.JobID)
	}
	return fmt.Sprintf("%v (job %s, request id %s)", e.Err, e.JobID, e.RequestID)
}

// Unwrap returns the error of the call.
func (e *LostJobError) Unwrap() error { return e.Err }

func lostJob(jobID, requestID string, err error) error {
	if jobID == "" {
		return err
	}
	return &LostJobError{JobID: jobID, RequestID: requestID, Err: err}
}

// Generate draws images and follows the job to its end. It calls onEvent, which may be nil, with
// every event but the pieces of images, which it puts together and checks.
//
// When the connection is lost, or the server restarts, the call is made again and goes on behind the last
// event of the same job, as Watch does; a job that the server has given up meanwhile is drawn anew. While that
// fails policy.OnConnectionLost gets a *LostJobError, and in the end the caller. The server holds the job for
// request.ReconnectWindow after it has noticed: 30 s where neither that nor a request id is given.
//
// Cancelling ctx cancels the job at its next step, unless request.Detached is set or the connection is lost, when
// the same request may still be made again with the id that the error names; the deadline of
// ctx is the job's. A job that fails is a gRPC status error; an image that did not arrive as it was
// announced wraps ErrBrokenImage, any other broken promise of the stream ErrBrokenStream. An image that
// the server has lost is a status error with codes.DataLoss: its details (errdetails.ErrorInfo) name it.
func (c *Client) Generate(
	ctx context.Context,
	request *hidreamv1.GenerateRequest,
	policy ReconnectPolicy,
	onEvent func(*hidreamv1.JobEvent),
) ([]Image, error) {
	// With an id of the caller's others may wait for the same job, which leaving must not stop.
	isHeld := request.GetRequestId() == "" && !request.GetDetached()
	request = proto.CloneOf(request)
	request.RequestId = requestID(request.GetRequestId())
	if isHeld && request.ReconnectWindow == nil {
		request.ReconnectWindow = durationpb.New(min(max(policy.reconnectTime(), 0), maxReconnectWindow))
	}
	generation := generation{story: story{onEvent: onEvent}}
	if !request.GetDetached() {
		generation.requestID = request.GetRequestId()
	}
	err := resume(ctx, policy, generation.lost,
		func(ctx context.Context) (grpc.ServerStreamingClient[hidreamv1.GenerateResponse], error) {
			return c.stub.Generate(ctx, request)
		},
		generation.add)
	if err != nil && !errors.Is(err, errStop) {
		hasLeft := ctx.Err() != nil || errors.Is(err, ErrBrokenStream)
		if isHeld && hasLeft && !generation.isLost && generation.jobID != "" {
			c.leave(ctx, generation.jobID)
		}
		return nil, err
	}
	return generation.images()
}

// leave stops a job that the server would hold for a caller whose connection is lost. A server that does not
// answer stops it itself, a little later.
func (c *Client) leave(ctx context.Context, jobID string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	c.stub.CancelJob(ctx, &hidreamv1.CancelJobRequest{JobId: jobID})
}

// generation is what the calls of one request have brought.
type generation struct {
	story
	jobID        string
	requestID    string // of a job that stops without its caller
	isLost       bool   // no call has been answered since the connection was lost
	lastSequence int64
	position     int32 // in the queue; 0 for a job that does not wait
}

func (g *generation) lost(err error) error {
	g.isLost = true
	return lostJob(g.jobID, g.requestID, err)
}

func (g *generation) add(response *hidreamv1.GenerateResponse) error {
	g.isLost = false
	if response.GetJobId() != g.jobID {
		// The first job, or the one in place of a job that was given up while nobody could be reached.
		*g = generation{story: story{onEvent: g.onEvent}, jobID: response.GetJobId(), requestID: g.requestID}
	}
	event := response.GetEvent()
	position := event.GetQueued().GetQueuePosition()
	// A server that was started again counts the positions in its queue anew.
	isNewPosition := g.position != 0 && position != 0 && position != g.position
	if event.GetSequence() <= g.lastSequence && !isNewPosition {
		return nil
	}
	g.lastSequence, g.position = max(g.lastSequence, event.GetSequence()), position
	if err := g.story.add(event); err != nil {
		return err
	}
	return endOf(event)
}

// requestID is the id of a request, or else one of its own, so that a retry does not draw twice.
func requestID(named string) string {
	if named != "" {
		return named
	}
	return rand.Text()
}
