package hidream

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// Watch follows a job to its end, from its current state on, and returns its images. It calls onEvent,
// which may be nil, with every event but the pieces of images, which it puts together and checks.
//
// When the connection is lost, or the server restarts, it goes on behind the last event: nothing is
// missed that matters, and nothing comes twice. A job that failed or was cancelled is a gRPC status
// error, as is an image that the server has lost (codes.DataLoss, never asked for again); an image that
// did not arrive as it was announced wraps ErrBrokenImage. Leaving does not touch the job.
func (c *Client) Watch(
	ctx context.Context,
	jobID string,
	policy ReconnectPolicy,
	onEvent func(*hidreamv1.JobEvent),
) ([]Image, error) {
	story := story{onEvent: onEvent}
	request := &hidreamv1.WatchJobRequest{JobId: jobID}
	err := resume(ctx, policy, func(err error) error { return lostJob(jobID, "", err) },
		func(ctx context.Context) (grpc.ServerStreamingClient[hidreamv1.WatchJobResponse], error) {
			return c.stub.WatchJob(ctx, request)
		},
		func(response *hidreamv1.WatchJobResponse) error {
			event := response.GetEvent()
			if err := story.add(event); err != nil {
				return err
			}
			request = &hidreamv1.WatchJobRequest{JobId: jobID, AfterSequence: event.GetSequence()}
			return endOf(event)
		})
	if err != nil && !errors.Is(err, errStop) {
		return nil, err
	}
	return story.images()
}

// endOf is the error with which an event ends its job; errStop where it ended well.
func endOf(event *hidreamv1.JobEvent) error {
	switch event := event.GetEvent().(type) {
	case *hidreamv1.JobEvent_Succeeded:
		return errStop
	case *hidreamv1.JobEvent_Failed:
		return status.ErrorProto(event.Failed.GetStatus())
	case *hidreamv1.JobEvent_Cancelled:
		return status.Errorf(codes.Canceled, "the job was cancelled: %s", event.Cancelled.GetReason())
	default:
		return nil
	}
}

// WatchAll calls onChange with every change of state of the caller's jobs that match, those that match
// now first, until it returns an error, which WatchAll then returns, or ctx ends. When the connection
// is lost it goes on; what was told before is not told again.
func (c *Client) WatchAll(
	ctx context.Context,
	request *hidreamv1.WatchJobsRequest,
	policy ReconnectPolicy,
	onChange func(*hidreamv1.WatchJobsResponse) error,
) error {
	// Every connection begins with the jobs that match then.
	states := map[string]hidreamv1.JobState{}
	err := resume(ctx, policy, func(err error) error { return err },
		func(ctx context.Context) (grpc.ServerStreamingClient[hidreamv1.WatchJobsResponse], error) {
			return c.stub.WatchJobs(ctx, request)
		},
		func(response *hidreamv1.WatchJobsResponse) error {
			job := response.GetJob()
			if state, isKnown := states[job.GetJobId()]; isKnown && state == job.GetState() {
				return nil
			}
			states[job.GetJobId()] = job.GetState()
			return onChange(response)
		})
	if err == nil {
		return fmt.Errorf("%w: the stream of changes ended", ErrBrokenStream)
	}
	return err
}
