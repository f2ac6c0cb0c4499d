// Package hidream is a small client of a hidream-grpc server, on the generated stubs in v1.
package hidream

import (
	"context"
	"fmt"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// DefaultTimeout is Client.Timeout of a new client.
const DefaultTimeout = 30 * time.Second

// Client calls one server. Its methods may be called at the same time. Errors of the server are gRPC
// status errors, with the details that image_gen.proto lists.
type Client struct {
	// Timeout is the deadline of every call with one answer whose context has none; 0 for none. Such a call
	// that is UNAVAILABLE for as long as the server says is tried twice more.
	Timeout time.Duration

	stub hidreamv1.ImageGenClient
}

// NewClient is a client on a connection, which stays the caller's to close; make it with DialOptions, so that
// a server that falls silent is noticed.
func NewClient(connection grpc.ClientConnInterface) *Client {
	return &Client{Timeout: DefaultTimeout, stub: hidreamv1.NewImageGenClient(connection)}
}

// Submit queues a job and returns it at once.
func (c *Client) Submit(ctx context.Context, request *hidreamv1.SubmitJobRequest) (*hidreamv1.Job, error) {
	request = proto.CloneOf(request)
	request.RequestId = requestID(request.GetRequestId())
	return answer(ctx, c.Timeout, c.stub.SubmitJob, request)
}

// Batch queues many jobs, all of them or none, and returns them in the order of the requests.
func (c *Client) Batch(ctx context.Context, requests []*hidreamv1.SubmitJobRequest) ([]*hidreamv1.Job, error) {
	batch := proto.CloneOf(&hidreamv1.BatchSubmitJobsRequest{Requests: requests})
	for _, request := range batch.GetRequests() {
		request.RequestId = requestID(request.GetRequestId())
	}
	response, err := answer(ctx, c.Timeout, c.stub.BatchSubmitJobs, batch)
	return response.GetJobs(), err
}

// Get returns a job as it is now.
func (c *Client) Get(ctx context.Context, jobID string) (*hidreamv1.Job, error) {
	return answer(ctx, c.Timeout, c.stub.GetJob, &hidreamv1.GetJobRequest{JobId: jobID})
}

// List gives the caller's jobs that match, newest first, from the request's page on, and fetches page
// after page as they are read. An error is the last that it gives.
func (c *Client) List(ctx context.Context, request *hidreamv1.ListJobsRequest) iter.Seq2[*hidreamv1.Job, error] {
	return func(yield func(*hidreamv1.Job, error) bool) {
		pageToken := request.GetPageToken()
		for {
			page, err := answer(ctx, c.Timeout, c.stub.ListJobs, &hidreamv1.ListJobsRequest{
				PageSize:  request.GetPageSize(),
				PageToken: pageToken,
				States:    request.GetStates(),
				Labels:    request.GetLabels(),
			})
			if err != nil {
				yield(nil, err)
				return
			}
			for _, job := range page.GetJobs() {
				if !yield(job, nil) {
					return
				}
			}
			if pageToken = page.GetNextPageToken(); pageToken == "" {
				return
			}
		}
	}
}

// Cancel stops a job at its next step and returns it as it is then; one that has ended stays as it is.
func (c *Client) Cancel(ctx context.Context, jobID string) (*hidreamv1.Job, error) {
	return answer(ctx, c.Timeout, c.stub.CancelJob, &hidreamv1.CancelJobRequest{JobId: jobID})
}

// Delete deletes a job that has ended, and its images.
func (c *Client) Delete(ctx context.Context, jobID string) error {
	_, err := answer(ctx, c.Timeout, c.stub.DeleteJob, &hidreamv1.DeleteJobRequest{JobId: jobID})
	return err
}

// story is what a stream of events tells of one job, over any number of calls.
type story struct {
	onEvent   func(*hidreamv1.JobEvent)
	assembler ImageAssembler
	job       *hidreamv1.Job
}

func (s *story) add(event *hidreamv1.JobEvent) error {
	if chunk := event.GetImageChunk(); chunk != nil {
		return s.assembler.Add(chunk)
	}
	if succeeded := event.GetSucceeded(); succeeded != nil {
		// Before anybody is told of a success.
		if _, err := s.assembler.Images(succeeded.GetJob()); err != nil {
			return err
		}
		s.job = succeeded.GetJob()
	}
	if s.onEvent != nil {
		s.onEvent(event)
	}
	return nil
}

func (s *story) images() ([]Image, error) {
	if s.job == nil {
		if err := s.assembler.unfinished(); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: it ended before the job did", ErrBrokenStream)
	}
	return s.assembler.Images(s.job)
}
